"""The trainer's view of the data: epochs of micro-batches that can be resumed anywhere."""

import math
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from mimir_fast.data.archives import read_npz
from mimir_fast.data.augment import PAD, Channels
from mimir_fast.data.datasets import INFO, DatasetInfo, Source, dataset_info, read_images
from mimir_fast.data.errors import BadFiles, DataError
from mimir_fast.data.schedule import EdmSampler, KeySampler, Schedule, ShuffleSchedule, check_unsup_fraction
from mimir_fast.data.sources import MixedImages
from mimir_fast.data.workers import BatchMaker, sigterm_held, start_worker, unchanged


class BatchStream:
    """One rank's micro-batches, a function of (seed, epoch, step, rank) whatever the number of workers.

    name         the data set, with an "s" appended when generated images are mixed in
    num_images   real training images
    mean, std    per channel, of images in [0,1]
    """

    def __init__(
        self,
        name: str,
        num_images: int,
        info: DatasetInfo,
        schedule: Schedule,
        batches: BatchMaker,
        num_workers: int = 0,
        pin_memory: bool = False,
    ):
        self.name, self.num_images = name, num_images
        self.mean: Channels = info.mean
        self.std: Channels = info.std
        self._bad: BadFiles = batches.source.bad
        self._keys = KeySampler(schedule)
        self._length = len(schedule)
        self._running: Iterator[tuple[Tensor, Tensor]] | None = None
        self._loader: DataLoader | None = _loader(batches, self._keys, num_workers, pin_memory)

    def __len__(self) -> int:
        """Micro-batches per epoch and rank; the last incomplete one is dropped."""
        return self._length

    @property
    def bad_files(self) -> dict[str, str]:
        """Unreadable images met so far in this run: path -> reason."""
        return dict(self._bad.reasons)

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Images uint8 [B,3,H,W] and labels int64 [B] of micro-batches start_step, start_step + 1, ... of an epoch.

        An iterator of an earlier call ends here.  Raises DataError for positions outside the epoch and, while
        iterating, when too many images turn out to be unreadable; RuntimeError after `close`.
        """
        if self._loader is None:
            raise RuntimeError("this BatchStream is closed")
        if epoch < 0 or not 0 <= start_step <= len(self):
            raise DataError(f"start_step: no step {start_step} in epoch {epoch} of {len(self)} micro-batches")
        self._end_running()
        self._running = self._batches(epoch, start_step)
        return self._running

    def close(self) -> None:
        """End the worker processes; may be called again."""
        self._end_running()
        self._loader = None  # the workers end with the last reference to their iterator

    def _batches(self, epoch: int, start_step: int) -> Iterator[tuple[Tensor, Tensor]]:
        self._keys.position = (epoch, start_step)
        with sigterm_held():
            batches = iter(self._loader)
        try:
            for images, labels, bad in batches:
                self._bad.record(bad)
                yield images, labels
        finally:
            del batches  # an error's traceback keeps this frame: without the reference `close` ends the workers at once

    def _end_running(self) -> None:
        if self._running is not None:
            self._running.close()
            self._running = None


def _loader(batches: BatchMaker, keys: KeySampler, num_workers: int, pin_memory: bool) -> DataLoader:
    """A loader with a random generator of its own, so that the global one stays as it is.

    On Linux workers are forked: they share the images in memory instead of copying them.
    """
    return DataLoader(
        batches,
        sampler=keys,
        batch_size=None,
        num_workers=num_workers,
        collate_fn=unchanged,
        pin_memory=pin_memory and torch.cuda.is_available(),
        worker_init_fn=start_worker,
        persistent_workers=num_workers > 0,
        multiprocessing_context="fork" if num_workers > 0 and sys.platform == "linux" else None,
        generator=torch.Generator(),
    )


def build_pretrain_data(
    dataset: str,
    data_root: str | Path,
    input_size: int,
    batch_size: int,
    *,
    accum_iter: int = 1,
    seed: int = 0,
    rank: int = 0,
    world_size: int = 1,
    num_workers: int = 0,
    pin_memory: bool = False,
    use_edm: bool = False,
    unsup_fraction: float = 0.7,
    aux_data_filename: str | Path = "",
) -> BatchStream:
    """Training images of a data set as batches of `batch_size` per rank, cropped to input_size pixels and flipped.

    accum_iter          micro-batches per update; shortens the epoch if use_edm, as in the original
    use_edm             fill unsup_fraction of each batch with generated images from aux_data_filename (.npz)
    Raises DataError: one line that names the flag, file or folder and what to do.
    """
    info = dataset_info(dataset)
    _check_input_size(dataset, info, input_size)
    if use_edm:
        _check_edm(dataset, info, unsup_fraction, aux_data_filename)
    _check_counts(batch_size, accum_iter, rank, world_size, num_workers)
    source = real = read_images(dataset, data_root, in_memory=use_edm)
    if use_edm:
        source, schedule = _mixed(
            real, aux_data_filename, batch_size, unsup_fraction, accum_iter * world_size, seed=seed, rank=rank
        )
    else:
        schedule = ShuffleSchedule(len(real), batch_size, rank, world_size, seed)
    batches = BatchMaker(source, input_size, info.side is None, info.flip, seed, rank)
    name = f"{dataset}s" if use_edm else dataset
    return BatchStream(name, len(real), info, schedule, batches, num_workers, pin_memory)


def _mixed(
    real: Source, aux_data_filename: str | Path, batch_size: int, unsup_fraction: float, divisor: int, **position: int
) -> tuple[MixedImages, EdmSampler]:
    """Real and generated images with their sampler; the epoch has ceil(real / (batch_size * divisor)) batches."""
    generated = read_npz(Path(aux_data_filename).expanduser(), "aux_data_filename")
    num_batches = math.ceil(len(real) / (batch_size * divisor))
    source = MixedImages(real, generated, str(aux_data_filename))
    return source, EdmSampler(len(real), len(generated), batch_size, unsup_fraction, num_batches, **position)


def _check_input_size(dataset: str, info: DatasetInfo, input_size: int) -> None:
    largest = math.inf if info.side is None else info.side + 2 * PAD
    if not 1 <= input_size <= largest:
        allowed = (
            "a positive number" if info.side is None else f"1 to {largest} (images of {info.side} padded by {PAD})"
        )
        raise DataError(f"input_size: {input_size} is not possible for {dataset}, expected {allowed}")


def _check_edm(dataset: str, info: DatasetInfo, unsup_fraction: float, aux_data_filename: str | Path) -> None:
    if not info.edm:
        raise DataError(f"use_edm: not possible with {dataset}, only with {', '.join(n for n in INFO if INFO[n].edm)}")
    if not str(aux_data_filename):
        raise DataError("aux_data_filename: use_edm needs the .npz file of generated images")
    check_unsup_fraction(unsup_fraction)


def _check_counts(batch_size: int, accum_iter: int, rank: int, world_size: int, num_workers: int) -> None:
    counts = {"batch_size": (batch_size, 1), "accum_iter": (accum_iter, 1), "world_size": (world_size, 1)}
    for field, (value, least) in (counts | {"num_workers": (num_workers, 0)}).items():
        if value < least:
            raise DataError(f"{field}: expected {least} or more, got {value}")
    if not 0 <= rank < world_size:
        raise DataError(f"rank: expected 0 to {world_size - 1}, got {rank}")
