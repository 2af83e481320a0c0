"""Boxes and flips of random crops: functions of (seed, epoch, index), whatever the rank, the batch size and the workers.

Shapes: B images, A = CROP_ATTEMPTS.
"""

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from mimir_fast.data.crops import CROP_AREA, CROP_ATTEMPTS, CROP_RATIO, central_box
from mimir_fast.data.randomness import Purpose

# Of Philox-4x32-10: Salmon et al., Parallel Random Numbers: As Easy as 1, 2, 3, 2011.
MULTIPLIERS = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
KEY_STEPS = 0x9E3779B9, 0xBB67AE85
ROUNDS = 10
LOW = np.uint64(0xFFFFFFFF)
HALF = np.uint64(32)


def philox(key: int, *counter: np.ndarray) -> tuple[np.ndarray, ...]:
    """Four 32-bit words (in uint64) for each counter; counter: its four words in uint64, key: 64 bits."""
    # In 64 bits, so that a product holds its high word.
    c0, c1, c2, c3 = counter
    k0, k1 = key & int(LOW), key >> 32 & int(LOW)
    for _ in range(ROUNDS):
        first, second = MULTIPLIERS[0] * c0, MULTIPLIERS[1] * c2
        c0, c1 = second >> HALF ^ c1 ^ np.uint64(k0), second & LOW
        c2, c3 = first >> HALF ^ c3 ^ np.uint64(k1), first & LOW
        k0, k1 = k0 + KEY_STEPS[0] & int(LOW), k1 + KEY_STEPS[1] & int(LOW)
    return c0, c1, c2, c3


class Draws(NamedTuple):
    """The random numbers of B crops: float64 [B,A,4] in [0,1), which `boxes` makes boxes of, and flips bool [B]."""

    numbers: np.ndarray
    flips: np.ndarray


def draw(seed: int, epoch: int, indices: np.ndarray) -> Draws:
    """The random numbers of the crops of images `indices` [B] in an epoch.

    Key: the seed.  Counter: (index, attempt, epoch, purpose).  Attempts 0 to A - 1 are the tries at a box, attempt A the flip.
    """
    index = np.asarray(indices, np.uint64)[:, None] & LOW
    attempt = np.arange(CROP_ATTEMPTS + 1, dtype=np.uint64)[None]
    index, attempt = np.broadcast_arrays(index, attempt)
    purpose = np.uint64(Purpose.CROP)
    words = philox(seed % 2**64, index, attempt, np.full_like(index, epoch), np.full_like(index, purpose))
    # In fp64, which holds all 32 bits: in fp32 the largest words would become 1.
    numbers = np.stack(words, axis=-1) * 2.0**-32
    return Draws(numbers[:, :-1], numbers[:, -1, 0] < 0.5)


def boxes(
    numbers: np.ndarray, heights: ArrayLike, widths: ArrayLike, area_range: tuple[float, float] = CROP_AREA
) -> np.ndarray:
    """Boxes (top, left, height, width) int64 [B,4], distributed as torchvision's RandomResizedCrop, in images of these sizes.

    numbers   of `draw`: area, logarithm of width / height, top and left of each attempt; the first that fits is taken
    """
    u_area, u_ratio, u_top, u_left = np.moveaxis(numbers, -1, 0)
    heights, widths = np.asarray(heights), np.asarray(widths)
    log_low, log_high = (math.log(ratio) for ratio in CROP_RATIO)
    area = (heights * widths)[:, None] * (area_range[0] + (area_range[1] - area_range[0]) * u_area)
    ratio = np.exp(log_low + (log_high - log_low) * u_ratio)
    # rint rounds halves to even, as Python's round does in torchvision.
    w, h = np.rint(np.sqrt(area * ratio)), np.rint(np.sqrt(area / ratio))
    fits = (w > 0) & (w <= widths[:, None]) & (h > 0) & (h <= heights[:, None])
    top = np.floor(u_top * (heights[:, None] - h + 1))
    left = np.floor(u_left * (widths[:, None] - w + 1))
    first = np.arange(len(fits)), fits.argmax(axis=1)
    random = np.stack([part[first] for part in (top, left, h, w)], axis=1)
    central = np.stack(central_box(heights, widths), axis=1)
    return np.where(fits.any(axis=1)[:, None], random, central).astype(np.int64)
