"""Pixels of a cache: row pairs of luma and chroma from an RGB image."""

import numpy as np
import pytest
from PIL import Image

from mimir_fast.data.cache.pixels import row_pair_bytes, to_image, to_yuv420

# Weights of red, green and blue, written out: luma, Cb, Cr (JFIF 1.02).
JFIF = np.array([[0.299, 0.587, 0.114], [-0.168736, -0.331264, 0.5], [0.5, -0.418688, -0.081312]])


@pytest.mark.parametrize("shape", [(1, 1), (2, 2), (5, 8), (6, 7), (33, 41)], ids=str)
def test_row_pairs_hold_luma_and_the_means_of_chroma(shape):
    height, width = shape
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    rows = to_yuv420(Image.fromarray(pixels))
    pairs, even = -(-height // 2), width + width % 2
    assert rows.shape == (pairs, row_pair_bytes(width)) == (pairs, 3 * even)
    assert rows.dtype == np.uint8
    padded = np.pad(pixels, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge").astype(float)
    exact = padded @ JFIF.T + [0, 128, 128]
    assert abs(rows[:, : 2 * even].reshape(2 * pairs, even) - exact[..., 0]).max() <= 0.51
    means = exact.reshape(pairs, 2, even // 2, 2, 3).mean((1, 3))
    for plane, channel in zip((rows[:, 2 * even : 5 * even // 2], rows[:, 5 * even // 2 :]), (1, 2)):
        # The mean of the colours is rounded to whole levels before, by half a level at most.
        assert abs(plane - means[..., channel]).max() <= 1.01


@pytest.mark.parametrize("shape", [(1, 1), (7, 10), (32, 40)], ids=str)
def test_an_image_in_ycbcr_is_stored_as_it_is(shape):
    height, width = shape
    planes = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    image = Image.fromarray(planes, "YCbCr")
    back = to_image(to_yuv420(image).flatten(), "yuv420", height, width)
    rows, even = to_yuv420(image), width + width % 2
    luma = rows[:, : 2 * even].reshape(-1, even)[:height, :width]
    assert (luma == planes[..., 0]).all()
    assert rows[0, 2 * even] == round(planes[:2, :2, 1].mean() + 1e-9)
    assert rows[0, 5 * even // 2] == round(planes[:2, :2, 2].mean() + 1e-9)
    assert back.size == image.size


def test_grey_stays_grey_and_primaries_reach_the_ends():
    grey = Image.fromarray(np.full((2, 2, 3), 77, np.uint8))
    assert to_yuv420(grey).tolist() == [[77, 77, 77, 77, 128, 128]]
    blue = Image.new("RGB", (2, 2), (0, 0, 255))
    assert to_yuv420(blue).tolist() == [[29, 29, 29, 29, 255, 107]]
