"""Pixels as a cache stores them.  Shapes: H W sides of the image, P = ceil(H/2) pairs of rows, W' = W rounded up to even."""

import numpy as np
from PIL import Image

from mimir_fast.kernels._shared.bt601 import BLUE, CB, CR, GREEN, GREY, RED

# Red, green, blue -> Cb, Cr, both around 0.
CHROMA = np.array([[-RED, -GREEN, 1 - BLUE], [1 - RED, -GREEN, -BLUE]], np.float32) / np.array([[CB], [CR]], np.float32)


def to_yuv420(image: Image.Image) -> np.ndarray:
    """Row pairs `Y0 Y1 Cb Cr` of an RGB image, BT.601 full range: uint8 [P, 3 W'], 1.5 bytes a pixel.

    Y0 and Y1 hold W' numbers each, Cb and Cr W'/2: means of squares of 2 by 2 pixels, centred as in JPEG.  Where a side is
    odd, its last row or column is there twice.  What crop_resize_yuv420 reads.
    """
    luma = np.asarray(image.convert("L"))
    height, width = luma.shape
    luma = np.pad(luma, ((0, height % 2), (0, width % 2)), mode="edge")
    # Squares that the edge cuts are averages of what is there: the same as of a last row or column repeated.
    chroma = np.asarray(image.reduce(2), np.float32) @ CHROMA.T + GREY
    chroma = np.clip(chroma + 0.5, 0, 255).astype(np.uint8)
    pairs = [luma[0::2], luma[1::2], chroma[..., 0], chroma[..., 1]]
    return np.concatenate(pairs, axis=1)


def row_pair_bytes(width: int) -> int:
    """Bytes of one pair of rows of an image of this width: 3 W'."""
    return 3 * (width + width % 2)
