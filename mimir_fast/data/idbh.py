"""IDBH augmentation, the weak version for CIFAR-10: a flip, CropShift, one operation on colours or shape, erasing.

Source: Li & Spratling, Data Augmentation Alone Can Improve Adversarial Training, arXiv 2301.09879.  Images are RGB, 8 bit.
"""

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

from mimir_fast.data.erasing import random_erasing

# Rows and columns together.
CROPPED_LINES = (0, 11)
# Probability.
ERASED = 0.5
# Range of the factor; 1 leaves an image as it is.
ENHANCERS = {
    ImageEnhance.Color: (0.1, 1.9),
    ImageEnhance.Brightness: (0.5, 1.9),
    ImageEnhance.Contrast: (0.5, 1.9),
    ImageEnhance.Sharpness: (0.1, 1.9),
}
# Pixels per pixel, in either direction, along x or y.
SHEAR = (0.05, 0.15)
# Degrees, in either direction.
ROTATION = (1.0, 11.0)
# Equally likely.
OPERATIONS = (*ENHANCERS, "autocontrast", "equalize", "shear", "rotate")


def crop_shift(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """CropShift: cut off 0 to 11 rows and columns, and paste the rest at a random place of a black image of the same size."""
    lines = int(rng.integers(CROPPED_LINES[0], CROPPED_LINES[1] + 1))
    columns = int(rng.integers(lines + 1))
    # At least one pixel is left of an image smaller than the range.
    columns, rows = min(columns, image.width - 1), min(lines - columns, image.height - 1)
    width, height = image.width - columns, image.height - rows
    left, top = (int(rng.integers(most + 1)) for most in (columns, rows))
    part = image.crop((left, top, left + width, top + height))
    result = Image.new("RGB", image.size)
    x, y = (int(rng.integers(most + 1)) for most in (columns, rows))
    result.paste(part, (x, y))
    return result


def color_or_shape(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """One of eight operations: colour, brightness, contrast, sharpness, autocontrast, equalise, shear, rotate."""
    operation = OPERATIONS[rng.integers(len(OPERATIONS))]
    if operation in ENHANCERS:
        return operation(image).enhance(rng.uniform(*ENHANCERS[operation]))
    if operation == "autocontrast":
        return ImageOps.autocontrast(image)
    if operation == "equalize":
        return ImageOps.equalize(image)
    sign = 1 if rng.random() < 0.5 else -1
    if operation == "rotate":
        return image.rotate(sign * rng.uniform(*ROTATION), Image.Resampling.BILINEAR)
    return _sheared(image, sign * rng.uniform(*SHEAR), bool(rng.random() < 0.5))


def _sheared(image: Image.Image, slope: float, along_x: bool) -> Image.Image:
    """Shift rows or columns in proportion to their distance from the centre."""
    x, y = (slope, 0.0) if along_x else (0.0, slope)
    # The constant terms keep the centre where it is.
    matrix = (1.0, x, -x * image.height / 2, y, 1.0, -y * image.width / 2)
    return image.transform(image.size, Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR)


def erase(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Blacken one box in half of the images."""
    return random_erasing(image, rng, ERASED)
