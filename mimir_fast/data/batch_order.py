"""Batch schedule: which images are in which batch, a function of (seed, epoch, step, rank); a resume needs no stored state."""

import math
from collections.abc import Iterator
from typing import NamedTuple, Protocol

import numpy as np

from mimir_fast.data.errors import DataError
from mimir_fast.data.randomness import Purpose, random_stream


class BatchKey(NamedTuple):
    """What a worker needs to make a batch; indices int64 [B]."""

    epoch: int
    step: int
    indices: np.ndarray


class Schedule(Protocol):
    """The order of one rank's batches."""

    def __len__(self) -> int: ...

    def batches(self, epoch: int, start_step: int = 0) -> Iterator[np.ndarray]:
        """Indices int64 [B] of batches start_step, start_step + 1, ... of the epoch."""
        ...


class ShuffleSchedule:
    """Shuffled epochs: one permutation per epoch, divided into global batches, each divided among the ranks.

    batch_size   per rank
    Images that do not fill a last global batch are left out.  Raises DataError when the images do not fill one global batch.
    """

    def __init__(self, num_images: int, batch_size: int, rank: int = 0, world_size: int = 1, seed: int = 0):
        if num_images < batch_size * world_size:
            raise DataError(
                f"batch_size: {batch_size} x {world_size} (world_size) = {batch_size * world_size} images per step, "
                f"but the data set has only {num_images}: choose a smaller batch_size"
            )
        self.num_images, self.batch_size = num_images, batch_size
        self.rank, self.world_size, self.seed = rank, world_size, seed

    def __len__(self) -> int:
        return self.num_images // (self.batch_size * self.world_size)

    def batches(self, epoch: int, start_step: int = 0) -> Iterator[np.ndarray]:
        """Indices int64 [B] of batches start_step, start_step + 1, ... of the epoch, for this rank."""
        order = random_stream(self.seed, Purpose.SHUFFLE, epoch).permutation(self.num_images)
        for step in range(start_step, len(self)):
            # The images of a step are the same on any number of ranks with the same global batch.
            first = (step * self.world_size + self.rank) * self.batch_size
            yield order[first : first + self.batch_size]


def check_unsup_fraction(unsup_fraction: float) -> None:
    """Raise DataError unless batches keep room for real images."""
    if not unsup_fraction < 1:
        raise DataError(f"unsup_fraction: {unsup_fraction} leaves no real images in a batch, give a number below 1")


class EdmSampler:
    """Batches of real images [0, n_sup) and generated ones [n_sup, n_sup + n_unsup), mixed as in the original.

    Real indices are taken in chunks of batch_size - int(batch_size * unsup_fraction) from a permutation that is redrawn
    when used up; a shorter last chunk is filled with generated images.  Generated indices are uniform with replacement;
    the batch is then shuffled.  A negative unsup_fraction merges both pools, each image drawn once per permutation; a batch
    across its end is filled from the next one.  Ranks draw independently.
    Raises DataError when unsup_fraction leaves no room for real images, or a pool is empty.
    """

    def __init__(
        self,
        n_sup: int,
        n_unsup: int,
        batch_size: int,
        unsup_fraction: float,
        num_batches: int,
        seed: int = 0,
        rank: int = 0,
    ):
        check_unsup_fraction(unsup_fraction)
        if n_sup < 1 or n_unsup < 1:
            raise DataError(f"use_edm: needs real and generated images, got {n_sup} and {n_unsup}")
        self.merged = unsup_fraction < 0
        self.n_sup = n_sup + n_unsup if self.merged else n_sup
        self.n_unsup = 0 if self.merged else n_unsup
        self.batch_size, self.num_batches = batch_size, num_batches
        self.sup_batch_size = batch_size - (0 if self.merged else int(batch_size * unsup_fraction))
        self.seed, self.rank = seed, rank

    def __len__(self) -> int:
        return self.num_batches

    def batches(self, epoch: int, start_step: int = 0) -> Iterator[np.ndarray]:
        """Indices int64 [B] of batches start_step, start_step + 1, ... of the epoch, for this rank."""
        real = self._merged_chunks(epoch, start_step) if self.merged else self._real_chunks(epoch, start_step)
        for step, chunk in zip(range(start_step, self.num_batches), real):
            rng = random_stream(self.seed, Purpose.MIX_GENERATED, epoch, self.rank, step)
            fill = self.batch_size - len(chunk)
            # A short chunk, the last of a permutation, is filled up too: every batch has the same size.
            generated = rng.integers(self.n_sup, self.n_sup + self.n_unsup, size=fill) if fill else chunk[:0]
            yield rng.permutation(np.concatenate([chunk, generated]))

    def _order(self, epoch: int, number: int) -> np.ndarray:
        """Permutation `number` of an epoch."""
        return random_stream(self.seed, Purpose.MIX_ORDER, epoch, self.rank, number).permutation(self.n_sup)

    def _real_chunks(self, epoch: int, start_step: int) -> Iterator[np.ndarray]:
        # A resume starts within a permutation: which one, and which of its chunks.
        per_order = math.ceil(self.n_sup / self.sup_batch_size)
        number, chunk = divmod(start_step, per_order)
        while True:
            order = self._order(epoch, number)
            for first in range(chunk * self.sup_batch_size, self.n_sup, self.sup_batch_size):
                yield order[first : first + self.sup_batch_size]
            number, chunk = number + 1, 0

    def _merged_chunks(self, epoch: int, start_step: int) -> Iterator[np.ndarray]:
        number, first = divmod(start_step * self.batch_size, self.n_sup)
        left = self._order(epoch, number)[first:]
        while True:
            while len(left) < self.batch_size:
                number += 1
                left = np.concatenate([left, self._order(epoch, number)])
            yield left[: self.batch_size]
            left = left[self.batch_size :]


class KeySampler:
    """Sampler of a DataLoader: the keys of one epoch, from `position` (epoch, step) on, which is set before each epoch."""

    def __init__(self, schedule: Schedule):
        self.schedule = schedule
        self.position = (0, 0)

    def __iter__(self) -> Iterator[BatchKey]:
        epoch, start_step = self.position
        for step, indices in enumerate(self.schedule.batches(epoch, start_step), start_step):
            yield BatchKey(epoch, step, indices)

    def __len__(self) -> int:
        return len(self.schedule) - self.position[1]
