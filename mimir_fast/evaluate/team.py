"""The processes of an evaluation: who attacks which images, and how their outcomes come together."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch.distributed as dist

from mimir_fast.config.sections import DistConfig
from mimir_fast.evaluate.records import Record
from mimir_fast.evaluate.watch import Watch
from mimir_fast.training.distributed import World, join_world

# Longer than any attack: a process that is gone is the watch's business.
FOREVER = timedelta(days=300)

T = TypeVar("T")


class Team:
    """The processes of an evaluation as one of them sees it; by default it is alone.

    Batches are those of a single process, dealt in turn, so that every image is attacked beside the same others and from the
    same start as there: outcomes do not depend on the number of processes.
    """

    def __init__(self, world: World = World(), group: "dist.ProcessGroup | None" = None, watch: Watch | None = None):  # noqa: B008
        self.world, self.group, self.watch = world, group, watch
        # Rounds that all have finished.
        self._turn = 0

    @property
    def is_main(self) -> bool:
        """Whether this process prints, and writes the results."""
        return self.world.is_main

    def words(self) -> str:
        """The number of processes, where there are several."""
        return f" x {self.world.size}" if self.world.size > 1 else ""

    def say(self, *lines: str) -> None:
        """Print lines, on process 0."""
        for line in lines if self.is_main else ():
            print(line)

    @contextmanager
    def first(self) -> Iterator[None]:
        """Context through which process 0 goes before the others."""
        if not self.is_main:
            self.gathered(None)
        yield
        # Not in a finally: where process 0 fails, the watch ends the others, which must not take it for done.
        if self.is_main:
            self.gathered(None)

    def dealt(self, rows: np.ndarray, size: int) -> np.ndarray:
        """This process's part of the rows that a round has still to attack in batches of `size`: every size-th batch."""
        batches = [rows[i : i + size] for i in range(0, len(rows), size)][self.world.rank :: self.world.size]
        # Fewer batches than processes leave some with none, and np.concatenate refuses an empty list.
        return np.concatenate(batches) if batches else rows[:0]

    def shared(self, make: Callable[[], T]) -> T:
        """What process 0 makes."""
        if self.world.size == 1:
            return make()
        box = [make() if self.is_main else None]
        # Pickled: the others get a copy, and see nothing of what process 0 changes in it afterwards.
        dist.broadcast_object_list(box, 0, group=self.group)
        return box[0]  # type: ignore[return-value]

    def gathered(self, value: T) -> list[T]:
        """The value of every process, by rank."""
        if self.world.size == 1:
            return [value]
        values: list = [None] * self.world.size
        dist.all_gather_object(values, value, group=self.group)
        return values

    def record(self, path: Path, indices: np.ndarray, correct: np.ndarray | bool = True) -> tuple[Record, bool]:
        """The record of an attack as process 0 finds it, in which each process enters its images; whether there was one."""
        record = Record(path, indices, correct)
        record, there = self.shared(lambda: (record, record.resume()))
        if not self.is_main:
            # A file of its own: of two processes that save to one, each would overwrite what the other has done.
            record.path, record.seconds = record.part(self.world.rank), 0.0
        return record, there

    def others(self, done: int, broken: int) -> tuple[int, int]:
        """After `done` images, `broken` of them broken: on process 0 what the others have finished of this round."""
        return self.watch.counted(self._turn, done, broken) if self.watch else (0, 0)

    def merge(self, record: Record) -> None:
        """After a round: enter into every process's record what the others did, and save it."""
        views = self.gathered((record.arrays(), record.seconds))
        # In a round each image has one process that attacks it: the order of the views does not matter.
        for arrays, _ in views:
            record.take(arrays)
        if self.is_main:
            record.seconds = sum(seconds for _, seconds in views)
            record.save()
        # The parts go when the whole is on the disk.
        self.gathered(None)
        if not self.is_main:
            # Counted anew in every round: process 0 has added them to its sum, and would add them again.
            record.seconds = 0.0
            record.path.unlink(missing_ok=True)
        self._turn += 1


ALONE = Team()


@contextmanager
def joined(config: DistConfig, device: str) -> Iterator[Team]:
    """Context with the processes that torchrun or srun started, or with this one alone; the error of one ends all.

    Raises what the context raises, PeerError (an OSError) if another process ended.
    """
    world = join_world(config, device)
    if world.size == 1:
        yield Team(world)
        return
    # A connection of its own: the main thread's may be busy.
    store = dist.distributed_c10d._get_default_store().clone()
    watch = Watch(store, world.rank, world.size)
    try:
        # Gloo on GPUs too: what is exchanged lies on the host, NCCL would send it through the device that is attacking.
        group = dist.new_group(backend="gloo", timeout=FOREVER)
        # Every process is a member.
        assert isinstance(group, dist.ProcessGroup)
        team = Team(world, group, watch)
        yield team
        # All are here, and nobody watches any more, before the first leaves.
        team.gathered(None)
        watch.stop()
        team.gathered(None)
    # BaseException, since the watch interrupts this thread with a KeyboardInterrupt.
    except BaseException as error:
        reason = watch.ends(error)
        if reason is error:
            raise
        # The traceback would show the wait that was interrupted, and not what went wrong elsewhere.
        raise reason from None
    finally:
        watch.stop()
        world.close()
