"""Decoding: what becomes of every kind of image that Pillow opens, for training, caches and evaluation alike.

grey, palette, black and white   the same colours in RGB
16 bits a channel                scaled to 8, grey and colour
alpha                            left out: the colours as they are stored, whatever lies behind them
CMYK, YCbCr                      Pillow's formula, without the file's colour profile
EXIF orientation                 not applied, as in the original's loader and in RobustBench's
animated                         the first frame
floats, 32-bit integers          refused: the range of their values is not known
"""

import warnings

import numpy as np
from PIL import Image
from PIL.JpegImagePlugin import JpegImageFile

# Pillow warns from 89 million pixels on, and refuses twice as many, which is an unreadable image like others.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)

# Largest value of 16 and of 8 bits.
LARGEST_16, LARGEST_8 = 65535, 255
# Formats whose 16-bit grey Pillow gives as 32-bit integers, in some versions.
GREY_16_AS_INTEGERS = ("PNG", "PPM")
UNKNOWN_RANGES = {"F": "floats", "I": "32-bit integers"}


class BadImageError(Exception):
    """An image that cannot be read; the message is the reason, one line."""


def to_rgb(image: Image.Image) -> Image.Image:
    """An opened image in RGB with 8 bits per channel.  Raises BadImageError for values of an unknown range."""
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in GREY_16_AS_INTEGERS):
        # `convert` would clip at 255 and give white.
        values = np.asarray(image).astype(np.int64)
        grey = (values * LARGEST_8 + LARGEST_16 // 2) // LARGEST_16
        return Image.fromarray(grey.astype(np.uint8)).convert("RGB")
    if image.mode in UNKNOWN_RANGES:
        raise BadImageError(
            f"pixels are {UNKNOWN_RANGES[image.mode]}, whose range is not known; convert it to 8 or 16 bits"
        )
    # Pillow warns of transparent colours in a palette unless it keeps them at first.
    if image.mode == "P" and isinstance(image.info.get("transparency"), bytes):
        image = image.convert("RGBA")
    if image.mode == "RGB":
        # Not converted, which would copy it.
        image.load()
        return image
    return image.convert("RGB")


def to_ycc_or_rgb(image: Image.Image) -> Image.Image:
    """An opened image: a JPEG file that holds luma and chroma in YCbCr, as the file has them; any other in RGB."""
    # As decoders tell it from a JPEG file of red, green and blue, where these say so without doubt.
    if (
        isinstance(image, JpegImageFile)
        and "jfif" in image.info
        and image.info.get("adobe_transform", 1) == 1
        and [layer[0] for layer in image.layer] == [1, 2, 3]
    ):
        image.draft("YCbCr", None)
        image.load()
        return image
    return to_rgb(image)
