"""Batch stream: epochs of micro-batches that can be resumed at any step."""

import sys
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from mimir_fast.data.batch_order import KeySampler, Schedule
from mimir_fast.data.cache.images import CachedImages
from mimir_fast.data.cache.packed import CachedCrops, PackedEpoch
from mimir_fast.data.crops import Channels
from mimir_fast.data.datasets import DatasetInfo
from mimir_fast.data.delivery import LOOK, delivered
from mimir_fast.data.errors import BadFiles, DataError
from mimir_fast.data.fingerprints import names_fingerprint
from mimir_fast.data.workers import BatchMaker, CropMaker, start_worker, unchanged, workers_starting

# How workers begin; macOS can only spawn safely.
START = "fork" if sys.platform == "linux" else "spawn"


class BatchStream:
    """One rank's micro-batches, a function of (seed, epoch, step, rank) whatever the number of workers.

    name         the data set, with an "s" appended when generated images are mixed in
    num_images   real training images
    classes      their names in label order; num_classes of them
    mean, std    per channel, of images in [0,1]
    origin       what is read, for the first lines of a run, where that is a cache; else empty
    cache        fingerprint of the cache that is read, else None
    fingerprint  of the images' names and labels, which the order of an epoch depends on
    interrupted  asked while no batch comes: whether the run was told to end, and waits no longer; may be set
    """

    def __init__(
        self,
        name: str,
        num_images: int,
        info: DatasetInfo,
        schedule: Schedule,
        batches: BatchMaker | CropMaker | CachedCrops,
        num_workers: int = 0,
        pin_memory: bool = False,
        classes: Sequence[str] = (),
    ):
        self.name, self.num_images = name, num_images
        self.classes, self.num_classes = list(classes), len(classes)
        self.mean: Channels = info.mean
        self.std: Channels = info.std
        source = batches.source
        self._bad: BadFiles = source.bad
        self.origin = source.origin if isinstance(source, CachedImages) else ""
        self.cache = source.cache.manifest.fingerprint if isinstance(source, CachedImages) else None
        self.fingerprint = names_fingerprint(source)
        self.interrupted: Callable[[], bool] = lambda: False
        self._keys = KeySampler(schedule)
        self._length = len(schedule)
        self._running: Generator[tuple[Tensor, Tensor], None, None] | PackedEpoch | None = None
        self._loader: DataLoader | CachedCrops | None = (
            batches if isinstance(batches, CachedCrops) else batch_loader(batches, self._keys, num_workers, pin_memory)
        )

    def __len__(self) -> int:
        """Micro-batches per epoch and rank; the last incomplete one is dropped."""
        return self._length

    @property
    def bad_files(self) -> dict[str, str]:
        """Unreadable images met so far in this run: path -> reason."""
        return dict(self._bad.reasons)

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Images uint8 [B,3,H,W] and labels int64 [B] of micro-batches start_step, start_step + 1, ... of an epoch.

        A call ends the iterator of the call before it.  Raises DataError for positions outside the epoch and, while
        iterating, when too many images turn out to be unreadable or no batch comes any more; RuntimeError after `close`.
        """
        loader = self._open_loader()
        if epoch < 0 or not 0 <= start_step <= len(self):
            raise DataError(f"start_step: no step {start_step} in epoch {epoch} of {len(self)} micro-batches")
        self._end_running()
        self._keys.position = (epoch, start_step)
        if isinstance(loader, CachedCrops):
            self._running = running = loader.epoch(self._keys, lambda: self.interrupted())
            return running
        self._running = batches = self._batches(loader)
        return batches

    def close(self) -> None:
        """End the worker processes or threads; may be called again."""
        self._end_running()
        # The workers end with the last reference to their iterator.
        self._loader = None

    def _open_loader(self) -> DataLoader | CachedCrops:
        if self._loader is None:
            raise RuntimeError("this BatchStream is closed")
        return self._loader

    def _batches(self, loader: DataLoader) -> Generator[tuple[Tensor, Tensor], None, None]:
        with workers_starting():
            batches = iter(loader)
        try:
            for images, labels, bad in delivered(batches, lambda: self.interrupted()):
                self._bad.record(bad)
                yield images, labels
        finally:
            # The traceback of an error keeps this frame alive: without these references `close` ends the workers at once.
            del batches, loader

    def _end_running(self) -> None:
        if self._running is not None:
            self._running.close()
            self._running = None


def batch_loader(
    batches: Dataset, keys: Iterable, num_workers: int, pin_memory: bool, persistent: bool = True
) -> DataLoader:
    """A DataLoader that takes whole batches by their keys."""
    return DataLoader(
        batches,
        sampler=keys,
        # The dataset makes whole batches.
        batch_size=None,
        num_workers=num_workers,
        collate_fn=unchanged,
        pin_memory=pin_memory and torch.cuda.is_available(),
        worker_init_fn=start_worker,
        timeout=LOOK if num_workers else 0,
        persistent_workers=persistent and num_workers > 0,
        # Forked workers share the images in memory; spawned ones would each hold a copy.
        multiprocessing_context=START if num_workers > 0 else None,
        # The loader draws a seed for its workers: from the global generator, it would change what the model draws.
        generator=torch.Generator(),
    )
