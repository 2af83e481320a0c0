"""Random erasing and Cutout: boxes of an image are overwritten.  Images are RGB, 8 bit."""

import math

import numpy as np
from PIL import Image

# Pixels.
CUTOUT_SIDE = 18
# Fraction of an image, for all boxes together.
AREA = (0.02, 1 / 3)
# Logarithm of height / width.
LOG_RATIO = (math.log(0.3), math.log(1 / 0.3))
ATTEMPTS = 10


def random_erasing(
    image: Image.Image, rng: np.random.Generator, prob: float, mode: str = "const", max_count: int = 1
) -> Image.Image:
    """Random erasing: with probability prob overwrite 1 to max_count boxes of random size, shape and place.

    mode   pixel: every pixel a random colour, rand: one random colour per box, const: black
    Boxes are those of timm's RandomErasing; colours are uniform over all 8-bit colours.
    Source: Zhong et al., arXiv 1708.04896.
    """
    # timm draws colours with mean 0 and deviation 1, for normalised images: on 8-bit images half of them are below black.
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
    """(top, left, height, width) of a random box smaller than the image in both directions; None after ten failed attempts."""
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
    """Cutout: blacken a square around a random pixel, cut off at the edges.  Source: DeVries & Taylor, arXiv 1708.04552."""
    image = image.copy()
    top, left = int(rng.integers(image.height)) - side // 2, int(rng.integers(image.width)) - side // 2
    image.paste((0, 0, 0), (max(left, 0), max(top, 0), min(left + side, image.width), min(top + side, image.height)))
    return image
