"""Images of an evaluation, by their indices in the data set.  N images."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import Tensor

from mimir_fast.data import EvalStream, eval_batches, subset_indices

# Seed of the choice of num_images.  Not that of the attacks: with other random starts the images must stay the same.
CHOICE = 0


@dataclass(frozen=True)
class Images:
    """Which images an evaluation uses, and how they are read: as in the validation of a training run.

    input_size   side of the centre crop, pixels
    num_images   a random choice of so many images, always the same ones; 0: all
    image_list   a file that lists the images, see eval_batches; None: all of the split
    held_out     number of images that the training held out, for split "held_out"
    """

    dataset: str
    data_root: str
    input_size: int
    split: str = "val"
    num_images: int = 0
    image_list: str | None = None
    held_out: int = 0
    num_workers: int = 0

    def stream(self, batch_size: int, indices: np.ndarray | None = None) -> EvalStream:
        """Batches of uint8 [B,3,S,S] and labels int64 [B] of all images, or of those of indices, in the order given."""
        return eval_batches(
            self.dataset,
            self.data_root,
            self.input_size,
            batch_size,
            split=self.split,
            indices=None if indices is None else indices.tolist(),
            image_list=self.image_list or None,
            held_out=self.held_out,
            num_workers=self.num_workers,
        )

    def choose(self) -> "Chosen":
        """The indices of the images, their classes and a fingerprint.  Raises DataError as the data package does."""
        stream = self.stream(batch_size=1)
        total = stream.num_images
        indices = np.arange(total)
        # At random: class folders are sorted by class, and the first images would be of the first class.
        if self.num_images:
            indices = np.asarray(subset_indices(total, self.num_images, CHOICE), np.int64)
        # The first image stands for the pixels of all: to hash them all would read the data set twice.
        first, label = next(iter(stream))
        facts = f"{self.dataset} {self.split} {self.input_size} {list(stream.classes)} {total} {int(label[0])}"
        listed = Path(self.image_list).expanduser().read_bytes() if self.image_list else b""
        # Little-endian on every machine: the hash is compared across machines.
        digest = hashlib.sha256(facts.encode() + indices.astype("<i8").tobytes() + first.numpy().tobytes() + listed)
        return Chosen(self, indices, list(stream.classes), digest.hexdigest())


@dataclass(frozen=True)
class Chosen:
    """The images that were chosen.

    indices       int64 [N], in the data set
    classes       names in label order
    fingerprint   the same for the same images in the same order
    """

    images: Images
    indices: np.ndarray
    classes: list[str]
    fingerprint: str

    def batches(self, rows: np.ndarray, batch_size: int) -> Iterator[tuple[np.ndarray, Tensor, Tensor]]:
        """Rows (positions in `indices`) with their images uint8 and labels, batch_size at a time, in the order given."""
        if len(rows):
            parts = [rows[i : i + batch_size] for i in range(0, len(rows), batch_size)]
            for part, batch in zip(parts, self.images.stream(batch_size, self.indices[rows])):
                yield part, *batch

    def identity(self) -> dict:
        """What results.json says of the images."""
        names = ("dataset", "split", "input_size", "image_list")
        facts = {name: getattr(self.images, name) for name in names}
        return {**facts, "n": len(self.indices), "classes": len(self.classes), "hash": self.fingerprint}
