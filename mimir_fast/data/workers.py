"""What runs where batches are made: in worker processes, or in the main one without workers."""

import os
import signal
import sys
import threading
from contextlib import contextmanager
from functools import partial

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mimir_fast.data.crops import centre_crop, random_flip, random_pad_crop, random_resized_crop
from mimir_fast.data.policies import Augment, Augmentation, Operation
from mimir_fast.data.randomness import Purpose, borrowed_generators, random_stream
from mimir_fast.data.schedule import BatchKey
from mimir_fast.data.sources import ArrayImages, FolderImages, MixedImages, TooManyBadError

HOLDS_SIGTERM = sys.platform == "linux"  # elsewhere a signal does not tell its sender
Batch = tuple[Tensor, Tensor, dict[str, str]]  # images uint8 [B,3,S,S], labels int64 [B], unreadable files met


class BatchMaker:
    """The map-style dataset of the loader: a key in, an augmented batch out, as a function of (seed, rank, key).

    source         images by index; if resize, from folders, cropped at a random scale, else padded and cropped
    input_size     side of the crops, pixels; flip: mirror half of the images
    augmentation   what else is done to them, nothing by default
    """

    def __init__(
        self,
        source: ArrayImages | MixedImages | FolderImages,
        input_size: int,
        resize: bool,
        flip: bool,
        seed: int,
        rank: int,
        augmentation: Augmentation = Augmentation(Augment()),  # noqa: B008 (immutable)
    ):
        self.source, self.input_size = source, input_size
        self.resize, self.flip, self.augmentation = resize, flip, augmentation
        self.seed, self.rank = seed, rank
        augmentation.plan(0, input_size)  # what it imports, workers need not

    def __getitem__(self, key: BatchKey) -> Batch:
        try:
            return self._make(key)
        except TooManyBadError as error:
            # As a value: an exception would arrive with the worker's traceback in its text.
            return torch.empty(0), torch.empty(0), error.bad

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
            crop = partial(random_pad_crop, rng=rng) if plan.move else centre_crop
            images = crop(images, size=self.input_size)
        images = random_flip(images, self.flip and plan.flip, rng)
        if plan.after:
            images = self._each(images.transpose(0, 2, 3, 1), plan.after, key, 1).transpose(0, 3, 1, 2).copy()
        return torch.from_numpy(images), torch.from_numpy(taken.labels), taken.bad

    def _each(self, images: np.ndarray, operations: tuple[Operation, ...], key: BatchKey, part: int) -> np.ndarray:
        """Operations on one image after the other, uint8 [B,H,W,C], each with random numbers of its own."""
        if not operations:
            return images
        results = np.empty(images.shape, np.uint8)
        with borrowed_generators() as seed_globals:
            for number, image in enumerate(map(Image.fromarray, np.ascontiguousarray(images))):
                position = key.epoch, self.rank, key.step, number, part
                rng = random_stream(self.seed, Purpose.AUGMENT_IMAGE, *position)
                seed_globals(rng)
                for operation in operations:
                    image = operation(image, rng)
                results[number] = image
        return results


def unchanged(batch: Batch) -> Batch:
    """The loader's collate function: a batch is made whole."""
    return batch


@contextmanager
def sigterm_held():
    """Block SIGTERM while workers are forked, so that they start with it blocked in every thread, native ones included."""
    if not HOLDS_SIGTERM:
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def start_worker(worker_id: int) -> None:
    """Leave signals to the main process, which may want to save first; it ends its workers itself.

    A terminal or a scheduler signals all processes of a job at once; only a SIGTERM from the main process counts.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    if HOLDS_SIGTERM:
        threading.Thread(target=_end_when_told_by, args=(os.getppid(),), daemon=True).start()


def _end_when_told_by(parent: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)
