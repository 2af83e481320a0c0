"""Erasing boxes from images.  Images are RGB and 8 bit."""

import math

import numpy as np
from PIL import Image

CUTOUT_SIDE = 18  # pixels
AREA = (0.02, 1 / 3)  # of an image, for all boxes together
LOG_RATIO = (math.log(0.3), math.log(1 / 0.3))  # height / width
ATTEMPTS = 10
MODES = ("pixel", "rand", "const")


def random_erasing(
    image: Image.Image, rng: np.random.Generator, prob: float, mode: str = "const", max_count: int = 1
) -> Image.Image:
    """With probability prob replace 1 to max_count boxes of random size, shape and place; other images pass as they are.

    mode   pixel: every pixel a random colour, rand: one random colour per box, const: black
    Boxes are those of timm's RandomErasing.  Its colours have mean 0 and deviation 1, which only makes sense for normalised
    images: half of them would be below black here.  Ours are uniform over all colours that exist, whatever the data set.
    Source: Zhong et al., arXiv 1708.04896.
    """
    if rng.random() >= prob:
        return image
    image = image.copy()
    count = int(rng.integers(1, max_count + 1))
    for _ in range(count):
        box = sample_box(image.height, image.width, rng, count)
        if box is not None:
            top, left, height, width = box
            image.paste(_filling(height, width, mode, rng), (left, top))
    return image


def sample_box(height: int, width: int, rng: np.random.Generator, count: int = 1) -> tuple[int, int, int, int] | None:
    """(top, left, height, width) of a box smaller than the image in both directions; None if ten attempts gave none."""
    for _ in range(ATTEMPTS):
        area = rng.uniform(*AREA) * height * width / count
        ratio = math.exp(rng.uniform(*LOG_RATIO))
        h, w = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < h < height and 0 < w < width:
            return int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1)), h, w
    return None


def _filling(height: int, width: int, mode: str, rng: np.random.Generator) -> Image.Image:
    if mode == "const":
        return Image.new("RGB", (width, height))
    if mode == "rand":
        return Image.new("RGB", (width, height), tuple(rng.integers(0, 256, 3).tolist()))
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8))


def cutout(image: Image.Image, rng: np.random.Generator, side: int = CUTOUT_SIDE) -> Image.Image:
    """Blacken a square around a random pixel, as far as it lies inside.  Source: DeVries & Taylor, arXiv 1708.04552."""
    image = image.copy()
    top, left = int(rng.integers(image.height)) - side // 2, int(rng.integers(image.width)) - side // 2
    image.paste((0, 0, 0), (max(left, 0), max(top, 0), min(left + side, image.width), min(top + side, image.height)))
    return image
