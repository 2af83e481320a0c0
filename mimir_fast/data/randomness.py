"""Stateless randomness: every draw is a function of where it happens, so a resumed run repeats it without stored state."""

from enum import IntEnum

import numpy as np


class Purpose(IntEnum):
    """What a stream of random numbers is for; streams of different purposes are independent."""

    SHUFFLE = 0
    AUGMENT = 1
    MIX_ORDER = 2
    MIX_GENERATED = 3
    HELD_OUT = 4
    SUBSET = 5
    AUGMENT_IMAGE = 6
    MIXUP = 7


def random_stream(seed: int, purpose: Purpose, *position: int) -> np.random.Generator:
    """The generator of (seed, purpose, position), position being epoch, rank, step...; global generators are untouched."""
    key = np.random.SeedSequence(entropy=seed % 2**64, spawn_key=(int(purpose), *position))
    return np.random.Generator(np.random.Philox(key))
