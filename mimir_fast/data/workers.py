"""Data loader workers: making a batch, and signals; without workers, batches are made in the main process."""

import ctypes
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TypeVar

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset

from mimir_fast.data.batch_order import BatchKey
from mimir_fast.data.boxes import boxes, draw
from mimir_fast.data.cache.images import CachedImages
from mimir_fast.data.crops import (
    centre_crop,
    flip_where,
    random_flip,
    random_pad_crop,
    random_resized_crop,
    resized_crop,
)
from mimir_fast.data.delivery import Batch, sent
from mimir_fast.data.errors import NoBatchError
from mimir_fast.data.policies import Augment, Augmentation, Operation
from mimir_fast.data.randomness import Purpose, borrowed_generators, random_stream
from mimir_fast.data.sources import ArrayImages, FolderImages, MixedImages, TooManyBadError

# Elsewhere a process cannot ask which process sent a signal.
HOLDS_SIGTERM = sys.platform == "linux"
# Linux: the signal that a process gets when the one that started it ends.
PARENT_DEATH_SIGNAL = 1
T = TypeVar("T")


class BatchMaker(Dataset[Batch]):
    """Map-style dataset of augmented batches: a batch is a function of (seed, rank, key).

    source         images by index
    input_size     side of the crops, pixels
    resize         crop at a random scale; else pad and crop
    flip           mirror half of the images
    augmentation   further operations, none by default
    """

    def __init__(
        self,
        source: ArrayImages | MixedImages | FolderImages | CachedImages,
        input_size: int,
        resize: bool,
        flip: bool,
        seed: int,
        rank: int,
        # immutable
        augmentation: Augmentation = Augmentation(Augment()),  # noqa: B008
    ):
        self.source, self.input_size = source, input_size
        self.resize, self.flip, self.augmentation = resize, flip, augmentation
        self.seed, self.rank = seed, rank
        # For its imports, which take seconds: forked workers then have them already.
        augmentation.plan(0, input_size)

    def __getitem__(self, key: BatchKey) -> Batch:
        return batch_or_bad(lambda: self._make(key))

    def _make(self, key: BatchKey) -> Batch:
        rng = random_stream(self.seed, Purpose.AUGMENT, key.epoch, self.rank, key.step)
        plan = self.augmentation.plan(key.epoch, self.input_size)
        if self.resize:
            crop = partial(random_resized_crop, size=self.input_size, rng=rng, area_range=plan.area)
            taken = self.source.take(key.indices, crop)
            images = taken.images.transpose(0, 3, 1, 2).copy()
        else:
            taken = self.source.take(key.indices)
            images = self._each(taken.images, plan.before, key, 0)
            size = self.input_size
            images = random_pad_crop(images, size, rng) if plan.move else centre_crop(images, size)
        images = random_flip(images, self.flip and plan.flip, rng)
        if plan.after:
            images = self._each(images.transpose(0, 2, 3, 1), plan.after, key, 1).transpose(0, 3, 1, 2).copy()
        return torch.from_numpy(images), torch.from_numpy(taken.labels), taken.bad

    def _each(self, images: np.ndarray, operations: tuple[Operation, ...], key: BatchKey, part: int) -> np.ndarray:
        """Apply the operations to every image of uint8 [B,H,W,C], each image with a random stream of its own.

        part   tells the operations before the crop from those after it, so that they draw different numbers
        """
        if not operations:
            return images
        results = np.empty(images.shape, np.uint8)
        with borrowed_generators() as seed_globals:
            for index, image in enumerate(map(Image.fromarray, np.ascontiguousarray(images))):
                position = key.epoch, self.rank, key.step, index, part
                rng = random_stream(self.seed, Purpose.AUGMENT_IMAGE, *position)
                seed_globals(rng)
                for operation in operations:
                    image = operation(image, rng)
                results[index] = np.asarray(image)
        return results


class CropMaker(Dataset[Batch]):
    """Map-style dataset of pre-training batches of images of any size: a crop is a function of (seed, epoch, index).

    input_size   side of the crops, pixels
    """

    def __init__(self, source: ArrayImages | FolderImages, input_size: int, seed: int):
        self.source, self.input_size, self.seed = source, input_size, seed

    def __getitem__(self, key: BatchKey) -> Batch:
        return batch_or_bad(lambda: self._make(key))

    def _make(self, key: BatchKey) -> Batch:
        drawn = draw(self.seed, key.epoch, key.indices)
        numbers = iter(drawn.numbers)

        def crop(image: Image.Image) -> np.ndarray:
            ((top, left, height, width),) = boxes(next(numbers)[None], [image.height], [image.width]).tolist()
            return resized_crop(image, top, left, height, width, self.input_size)

        taken = self.source.take(key.indices, crop)
        images = flip_where(taken.images.transpose(0, 3, 1, 2).copy(), drawn.flips)
        return torch.from_numpy(images), torch.from_numpy(taken.labels), taken.bad


def batch_or_bad(make: Callable[[], Batch]) -> Batch:
    """The batch, or empty tensors and the unreadable files where there were too many."""
    try:
        return sent(make())
    except TooManyBadError as error:
        # Returned, not raised: an exception would reach the user with the worker's traceback in its text.
        return torch.empty(0), torch.empty(0), error.bad


def unchanged(batch: T) -> T:
    """Collate function of a loader whose dataset makes whole batches."""
    return batch


@contextmanager
def workers_starting() -> Iterator[None]:
    """Context in which a loader starts its workers.  Raises NoBatchError where the machine does not let it.

    SIGTERM is blocked, so that they start with it blocked in every thread, native ones included.
    """
    # A thread inherits its signal mask: blocked later, in the worker, threads of libraries would still take the signal.
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM}) if HOLDS_SIGTERM else None
    in_main = threading.current_thread() is threading.main_thread()
    handler = signal.getsignal(signal.SIGCHLD) if in_main else None
    try:
        yield
    except OSError as error:
        raise NoBatchError(
            f"num_workers: data workers cannot be started ({error}); most often /dev/shm is missing or full, or memory is: "
            "docker run --shm-size=8g, or --num_workers 0"
        ) from error
    finally:
        # torch's handler would raise a dead worker's error wherever the program is, in the middle of an update too; `delivered`
        # meets it where batches are waited for.
        if in_main and signal.getsignal(signal.SIGCHLD) is not handler:
            signal.signal(signal.SIGCHLD, handler or signal.SIG_DFL)
        if mask is not None:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def start_worker(worker_id: int) -> None:
    """Worker init: ignore signals that are meant for the main process, which may save first and then ends its workers.

    A terminal or a scheduler signals all processes of a job at once; a worker obeys only a SIGTERM from the main process, and
    ends when that ends.
    """
    # Schedulers announce the end of a job's time with SIGUSR1; SIGHUP comes when a terminal is closed.
    for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    if HOLDS_SIGTERM:
        parent = os.getppid()
        # SIGKILL, since a SIGTERM is blocked here and counts only from a parent that lives.
        ctypes.CDLL(None).prctl(PARENT_DEATH_SIGNAL, signal.SIGKILL)
        # It may have ended before that.
        if os.getppid() != parent:
            os._exit(0)
        threading.Thread(target=_end_when_told_by, args=(parent,), daemon=True).start()


def _end_when_told_by(parent: int) -> None:
    # A handler of Python's is not told who sent a signal; sigwaitinfo is, if the signal is blocked.
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    # Not sys.exit, which in a thread ends the thread alone.
    os._exit(0)
