"""Pixels as a cache stores them.  Shapes: H W sides of the image, P = ceil(H/2) pairs of rows, W' = W rounded up to even."""

import numpy as np
from PIL import Image

from mimir_fast.kernels._shared.bt601 import BLUE, CB, CR, GREEN, GREY, RED

PIXELS = ("yuv420", "rgb")
# Red, green, blue -> Cb, Cr, both around 0.
CHROMA = np.array([[-RED, -GREEN, 1 - BLUE], [1 - RED, -GREEN, -BLUE]], np.float32) / np.array([[CB], [CR]], np.float32)


def to_yuv420(image: Image.Image) -> np.ndarray:
    """Row pairs `Y0 Y1 Cb Cr` of an image in RGB or YCbCr, BT.601 full range: uint8 [P, 3 W'], 1.5 bytes a pixel.

    Y0 and Y1 hold W' numbers each, Cb and Cr W'/2: means of squares of 2 by 2 pixels, centred as in JPEG.  Where a side is
    odd, its last row or column is there twice.  What crop_resize_yuv420 reads.
    """
    # Squares that the edge cuts are averages of what is there: the same as of a last row or column repeated.
    half = image.reduce(2)
    if image.mode == "YCbCr":
        luma, cb, cr = image.getchannel(0), half.getchannel(1), half.getchannel(2)
    else:
        # Pillow rounds to the nearest level and clamps, in half the time of NumPy.
        luma, (cb, cr) = image.convert("L"), (half.convert("L", (*weights, GREY)) for weights in CHROMA.tolist())
    height, width, even = image.height, image.width, image.width + image.width % 2
    rows = np.empty((half.height, row_pair_bytes(width)), np.uint8)
    pairs, numbers = rows[:, : 2 * even].reshape(-1, 2, even), np.asarray(luma)
    pairs[:, 0, :width] = numbers[0::2]
    pairs[: height // 2, 1, :width] = numbers[1::2]
    if height % 2:
        pairs[-1, 1] = pairs[-1, 0]
    if width % 2:
        pairs[:, :, width] = pairs[:, :, width - 1]
    rows[:, 2 * even : 5 * even // 2], rows[:, 5 * even // 2 :] = np.asarray(cb), np.asarray(cr)
    return rows


def row_pair_bytes(width: int) -> int:
    """Bytes of one pair of rows of an image of this width: 3 W'."""
    return 3 * (width + width % 2)


def to_pixels(image: Image.Image, pixels: str) -> np.ndarray:
    """An RGB image (for yuv420 a YCbCr one, too) as rows of the format `pixels`, a word of PIXELS: uint8, two-dimensional."""
    return to_yuv420(image) if pixels == "yuv420" else np.asarray(image).reshape(image.height, -1)


def to_image(data: np.ndarray, pixels: str, height: int, width: int) -> Image.Image:
    """The RGB image whose rows in the format `pixels` are data, uint8 [stored_bytes]; chroma is enlarged bicubically."""
    if pixels == "rgb":
        return Image.fromarray(data.reshape(height, width, 3))
    even = width + width % 2
    rows = data.reshape(-1, 3 * even)
    luma, chroma = rows[:, : 2 * even].reshape(-1, even), rows[:, 2 * even :].reshape(len(rows), 2, even // 2)
    planes = [Image.fromarray(np.ascontiguousarray(chroma[:, part])) for part in (0, 1)]
    large = [plane.resize((even, len(luma)), Image.Resampling.BICUBIC) for plane in planes]
    whole = Image.merge("YCbCr", [Image.fromarray(np.ascontiguousarray(luma)), *large]).convert("RGB")
    return whole.crop((0, 0, width, height))


def rows_in(pixels: str) -> int:
    """Rows of an image that one row of the format holds."""
    return 2 if pixels == "yuv420" else 1


def row_bytes(pixels: str, width):
    """Bytes of one row of the format; a number or an array."""
    return row_pair_bytes(width) if pixels == "yuv420" else 3 * width


def stored_bytes(pixels: str, height, width):
    """Bytes of an image in the format; numbers or arrays."""
    return -(-height // rows_in(pixels)) * row_bytes(pixels, width)


def reduced_size(width: int, height: int, size: int) -> tuple[int, int]:
    """(width, height) with the shorter side reduced to `size` pixels, the aspect kept; never enlarged, and not at size 0."""
    shorter = min(width, height)
    if not size or shorter <= size:
        return width, height
    longer = round(max(width, height) * size / shorter)
    return (size, longer) if width < height else (longer, size)


def reduced(image: Image.Image, size: int) -> Image.Image:
    """The image with its shorter side reduced to `size` pixels by Lanczos's filter where it is larger."""
    wanted = reduced_size(image.width, image.height, size)
    return image if image.size == wanted else image.resize(wanted, Image.Resampling.LANCZOS)
