"""Running a training: joining the processes, seeding, building the loop, and closing everything."""

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol, TypeVar

import numpy as np
import torch

from mimir_fast.config.resolve import Config, Run
from mimir_fast.training.compilation import keep_compiled_code
from mimir_fast.training.distributed import World, join_world


class Runs(Protocol):
    """A training that is ready to begin."""

    def run(self) -> int:
        """Train; returns the exit status."""
        ...

    def close(self) -> None:
        """End data workers and close files."""
        ...


Loop = TypeVar("Loop", bound=Runs)


@contextmanager
def running(run: Run[Config], build: Callable[[Run[Config], World], Loop]) -> Iterator[Loop]:
    """Context with a training that is ready to begin: joins the processes, seeds and builds it, and closes everything.

    Raises what `build` raises, and ValueError if this process's GPU does not exist.
    """
    world = join_world(run.config.dist, run.device)
    # the engine sets it for 16 bits; the next run in this process must not inherit it
    products = torch.get_float32_matmul_precision()
    try:
        seed_everything(run.config.run.seed + world.rank)
        keep_compiled_code()
        loop = build(run, world)
        try:
            yield loop
        finally:
            loop.close()
    finally:
        torch.set_float32_matmul_precision(products)
        world.close()


def seed_everything(seed: int) -> None:
    """Seed python, numpy and torch.  The step and the data loader have streams of their own, a function of their position."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
