"""Stateless randomness: every draw is a function of where it happens, so a resumed run repeats it without stored state."""

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import IntEnum

import numpy as np
import torch


class Purpose(IntEnum):
    """What a stream of random numbers is for; streams of different purposes are independent."""

    # Part of every stream's key: a changed number would change the results of seeded runs.

    SHUFFLE = 0
    AUGMENT = 1
    MIX_ORDER = 2
    MIX_GENERATED = 3
    HELD_OUT = 4
    SUBSET = 5
    AUGMENT_IMAGE = 6
    MIXUP = 7
    CROP = 8


def random_stream(seed: int, purpose: Purpose, *position: int) -> np.random.Generator:
    """The generator of (seed, purpose, position), position being epoch, rank, step...; global generators are untouched."""
    # Philox is counter-based: it is cheap to make, so that every batch and image can have a generator of its own.
    # A seed may be negative, which SeedSequence refuses.
    key = np.random.SeedSequence(entropy=seed % 2**64, spawn_key=(int(purpose), *position))
    return np.random.Generator(np.random.Philox(key))


@contextmanager
def borrowed_generators() -> Iterator[Callable[[np.random.Generator], None]]:
    """Seed the global generators of Python, numpy and torch (CPU) for libraries that draw from them; restore them at the end.

    Yields a function that seeds all three from a generator.
    """
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield _seed_globals
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])


def _seed_globals(rng: np.random.Generator) -> None:
    first, second, third = rng.integers(2**32, size=3).tolist()
    random.seed(first)
    np.random.seed(second)
    # torch.manual_seed would seed GPUs as well.
    torch.default_generator.manual_seed(third)
