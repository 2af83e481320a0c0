"""Crops in float64, written as dense matrices: every pixel of the box times its weight for every result.

nudge: added before rounding.  A sum that is nearly a half rounds either way in fp32; with +-nudge it does so here.
"""

import numpy as np


def crop_rgb(window: np.ndarray, box: tuple, size: int, nudge: float = 0.0) -> np.ndarray:
    """uint8 [h,w,3] -> uint8 [S,S,3]: along rows, rounded to 8 bits, then along columns."""
    top, left, height, width = box
    across = np.einsum("xk,ikc->ixc", weights(left, width, window.shape[1], size), window)
    down = np.einsum("yi,ixc->yxc", weights(top, height, window.shape[0], size), to_levels(across, nudge))
    return to_levels(down, nudge)


def crop_yuv420(luma: np.ndarray, chroma: np.ndarray, box: tuple, size: int, nudge: float = 0.0) -> np.ndarray:
    """uint8 [h,w] and [ceil(h/2),ceil(w/2),2] -> uint8 [S,S,3]: each resampled, then coloured, then rounded."""

    def resampled(plane: np.ndarray, box: np.ndarray) -> np.ndarray:
        down = weights(box[0], box[2], plane.shape[0], size)
        return down @ plane.astype(float) @ weights(box[1], box[3], plane.shape[1], size).T

    y = resampled(luma, np.asarray(box))
    cb, cr = (resampled(chroma[..., c], np.asarray(box) / 2) - 128 for c in (0, 1))
    # JFIF 1.02, with the digits that 0.299, 0.587 and 0.114 give.
    green = y - 0.344136286201022 * cb - 0.714136286201022 * cr
    return to_levels(np.stack([y + 1.402 * cr, green, y + 1.772 * cb], axis=-1), nudge)


def to_levels(values: np.ndarray, nudge: float) -> np.ndarray:
    return np.clip(np.floor(values + 0.5 + nudge), 0, 255).astype(np.uint8)


def weights(start: float, length: float, extent: int, size: int) -> np.ndarray:
    """[S,extent]: Keys' cubic (a = -0.5), stretched where it reduces, zero for pixels that the box does not touch."""
    start, length = np.float32(start), np.float32(length)
    end = float(start + length)
    start, length = float(start), float(length)
    pixel, stretch = np.arange(extent), max(length / size, 1)
    centre = start + (np.arange(size) + 0.5) * length / size
    t = abs(pixel + 0.5 - centre[:, None]) / stretch
    inner, outer = 1.5 * t**3 - 2.5 * t**2 + 1, -0.5 * t**3 + 2.5 * t**2 - 4 * t + 2
    table = np.where(t < 1, inner, np.where(t < 2, outer, 0)) * ((pixel + 1 > start) & (pixel < end))
    return table / table.sum(1, keepdims=True)
