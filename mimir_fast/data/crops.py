"""Crops, flips and conversion to floats.  Shapes: B batch, C channels, H W sides, S side of the crop."""

import math
from functools import lru_cache

import numpy as np
import torch
from numpy.lib.stride_tricks import sliding_window_view
from PIL import Image
from torch import Tensor

from mimir_fast.kernels._shared.bytes import as_floats

# Zeros on each side before a random crop, pixels.
PAD = 4
# Fraction of the image's area.
CROP_AREA = (0.2, 1.0)
# Width / height.
CROP_RATIO = (3 / 4, 4 / 3)
CROP_ATTEMPTS = 10
# Largest side of the input, pixels, up to which evaluation cuts off an image's edges, and the share that it keeps.
EDGES_CUT_TO, EDGES_CUT = 224, 224 / 256

Channels = tuple[float, float, float]


def to_float(images_u8: Tensor, mean: Channels | None = None, std: Channels | None = None) -> Tensor:
    """uint8 [..., C, H, W] -> float32 in [0,1], bit-equal to torchvision's ToTensor; then (x - mean) / std where given.

    Any device.  Raises ValueError for another dtype, or when only one of mean and std is given.
    """
    if images_u8.dtype != torch.uint8:
        raise ValueError(f"images_u8: expected torch.uint8, got {images_u8.dtype}")
    if (mean is None) != (std is None):
        raise ValueError("mean, std: give both or neither")
    images, device = as_floats(images_u8), images_u8.device
    if mean is None or std is None:
        return images
    return images.sub_(_channel_constants(tuple(mean), device)).div_(_channel_constants(tuple(std), device))


def model_input(images: Tensor, mean: Channels | None = None, std: Channels | None = None) -> Tensor:
    """Images as a model takes them: [..., C, H, W] uint8 by to_float, float32 in [0,1] as they are; then normalised."""
    if images.dtype == torch.uint8:
        return to_float(images, mean, std)
    if mean is None or std is None:
        return images
    # Not in place, unlike above: these floats are the caller's own.
    return images.sub(_channel_constants(tuple(mean), images.device)).div_(
        _channel_constants(tuple(std), images.device)
    )


# Cached: each copy of a list to a GPU makes the host wait.
@lru_cache(maxsize=16)
def _channel_constants(values: tuple[float, ...], device: torch.device) -> Tensor:
    """[C,1,1]"""
    return torch.tensor(values, dtype=torch.float32, device=device).view(-1, 1, 1)


def evaluated_share(size: int) -> float:
    """Share of a resized image's shorter side that the centre crop of evaluation keeps, for an input of `size` pixels."""
    return EDGES_CUT if size <= EDGES_CUT_TO else 1.0


def evaluated_side(size: int) -> int:
    """Pixels that evaluation resizes an image's shorter side to, for an input of `size` pixels."""
    return int(size / evaluated_share(size))


def crop_padded(images: np.ndarray, top: np.ndarray, left: np.ndarray, size: int) -> np.ndarray:
    """Crop each image at its own place of the zero-padded image: uint8 [B,H,W,C] -> [B,C,S,S].

    top, left   int [B], corner in the padded image: 0 .. H + 2 * PAD - size
    """
    batch, height, width, channels = images.shape
    # Windows are views: only the chosen crops are copied, all in one pass.
    padded = np.zeros((batch, height + 2 * PAD, width + 2 * PAD, channels), np.uint8)
    padded[:, PAD : PAD + height, PAD : PAD + width] = images
    windows = sliding_window_view(padded, (size, size), axis=(1, 2))
    return np.ascontiguousarray(windows[np.arange(batch), top, left])


def flip_where(images: np.ndarray, flip: np.ndarray) -> np.ndarray:
    """Mirror images [B,C,H,W] left to right where flip [B] is true, in place."""
    images[flip] = images[flip][..., ::-1]
    return images


def random_flip(images: np.ndarray, flip: bool, rng: np.random.Generator) -> np.ndarray:
    """Mirror each of the images [B,C,H,W] with probability 1/2, in place; without `flip` nothing is drawn."""
    return flip_where(images, rng.random(len(images)) < 0.5) if flip else images


def random_pad_crop(images: np.ndarray, size: int, rng: np.random.Generator) -> np.ndarray:
    """Random crop after padding by PAD zeros: uint8 [B,H,W,C] -> [B,C,S,S], S = size <= H + 2 * PAD."""
    batch, height, width, _ = images.shape
    top = rng.integers(0, height + 2 * PAD - size + 1, size=batch)
    left = rng.integers(0, width + 2 * PAD - size + 1, size=batch)
    return crop_padded(images, top, left, size)


def centre_crop(images: np.ndarray, size: int) -> np.ndarray:
    """The middle of images, padded by PAD zeros where needed: uint8 [B,H,W,C] -> [B,C,S,S], S = size <= H + 2 * PAD."""
    batch, height, width, _ = images.shape
    top, left = ((side + 2 * PAD - size) // 2 for side in (height, width))
    return crop_padded(images, np.full(batch, top), np.full(batch, left), size)


def sample_crop(
    height: int, width: int, rng: np.random.Generator, area_range: tuple[float, float] = CROP_AREA
) -> tuple[int, int, int, int]:
    """(top, left, height, width) of a crop with random area and shape, distributed as torchvision's RandomResizedCrop."""
    log_low, log_high = (math.log(ratio) for ratio in CROP_RATIO)
    for _ in range(CROP_ATTEMPTS):
        area = height * width * rng.uniform(*area_range)
        # Uniform in the logarithm: a shape and its transpose are equally likely.
        ratio = math.exp(rng.uniform(log_low, log_high))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return int(rng.integers(0, height - h + 1)), int(rng.integers(0, width - w + 1)), h, w
    # No crop fits a very long or tall image.
    top, left, h, w = (int(number) for number in central_box(height, width))
    return top, left, h, w


def central_box(height, width) -> tuple:
    """(top, left, height, width) of the largest central crop of an allowed shape, for numbers or arrays."""
    shape = np.divide(width, height)
    ratio = np.clip(shape, *CROP_RATIO)
    w = np.where(shape <= ratio, width, np.rint(height * ratio))
    h = np.where(shape >= ratio, height, np.rint(width / ratio))
    return (height - h) // 2, (width - w) // 2, h, w


def resized_crop(image: Image.Image, top: int, left: int, height: int, width: int, size: int) -> np.ndarray:
    """Crop a box of an RGB image and resize it, bicubic and antialiased: uint8 [S,S,C]."""
    # Two steps, as in torchvision: `resize(box=...)` would mix in pixels from outside the box.
    crop = image.crop((left, top, left + width, top + height))
    return np.asarray(crop.resize((size, size), Image.Resampling.BICUBIC))


def random_resized_crop(
    image: Image.Image, size: int, rng: np.random.Generator, area_range: tuple[float, float] = CROP_AREA
) -> np.ndarray:
    """A random part of an RGB image at a random scale: uint8 [S,S,C]."""
    return resized_crop(image, *sample_crop(image.height, image.width, rng, area_range), size)
