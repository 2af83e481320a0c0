"""The seed of a step's random numbers."""

import numpy as np


def step_seed(seed: int, rank: int, epoch: int, step: int) -> int:
    """Seed of one micro-step's noise: a function of its position, so that any step can be replayed and a run resumed."""
    # 63 bits, since seeds become int64 tensors.
    return int(np.random.SeedSequence([seed, rank, epoch, step]).generate_state(1, np.uint64)[0] >> 1)
