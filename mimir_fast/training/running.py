"""Running a training: joining the processes, seeding, building the loop, and closing everything."""

import random
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Protocol, TypeVar

import numpy as np
import torch

from mimir_fast.checkpoints.lock import locked
from mimir_fast.config.machine import limit_threads, prepare_machine
from mimir_fast.config.resolve import Config, Run
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

    Raises what `build` raises, ValueError if this process's GPU does not exist, FolderInUseError (a ValueError) if another
    program writes to the output folder.
    """
    prepare_machine()
    limit_threads()
    world = join_world(run.config.dist, run.device)
    # the engine sets it for 16 bits; the next run in this process must not inherit it
    products = torch.get_float32_matmul_precision()
    owned = ExitStack()
    try:
        folder = run.config.run.output_dir if world.is_main else ""
        owned.enter_context(locked(Path(folder)) if folder else nullcontext())
        seed_everything(run.config.run.seed + world.rank)
        loop = build(run, world)
        try:
            yield loop
        finally:
            loop.close()
    finally:
        torch.set_float32_matmul_precision(products)
        owned.close()
        world.close()


def seed_everything(seed: int) -> None:
    """Seed python, numpy and torch.  The step and the data loader have streams of their own, a function of their position."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
