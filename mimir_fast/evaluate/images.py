"""The images of an evaluation, by their numbers in the data set.  N images."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import Tensor

from mimir_fast.data import eval_batches, subset_indices

CHOICE = 0  # seed of the choice of num_images, whatever the attacks' seed


@dataclass(frozen=True)
class Images:
    """Which images are looked at: of a split or, with image_list, of a file of paths and labels.

    num_images: so many chosen at random (folders are sorted by class), always the same ones, 0 for all; held_out: images that
    the training held out, for split "held_out".
    Pixels come as in training's validation: the centre, side input_size.
    """

    dataset: str
    data_root: str
    input_size: int
    split: str = "val"
    num_images: int = 0
    image_list: str | None = None
    held_out: int = 0
    num_workers: int = 0

    def stream(self, batch_size: int, numbers: np.ndarray | None = None):
        """Batches of uint8 [B,3,S,S] and labels int64 [B] of all images, or of some by number, in the order given."""
        return eval_batches(
            self.dataset,
            self.data_root,
            self.input_size,
            batch_size,
            split=self.split,
            indices=None if numbers is None else numbers.tolist(),
            image_list=self.image_list or None,
            held_out=self.held_out,
            num_workers=self.num_workers,
        )

    def choose(self) -> "Chosen":
        """The numbers of the images, their classes and a fingerprint.  Raises DataError as the data package does."""
        stream = self.stream(batch_size=1)
        total = stream.num_images
        numbers = np.arange(total)
        if self.num_images:
            numbers = np.asarray(subset_indices(total, self.num_images, CHOICE), np.int64)
        first, label = next(iter(stream))
        facts = f"{self.dataset} {self.split} {self.input_size} {list(stream.classes)} {total} {int(label[0])}"
        listed = Path(self.image_list).expanduser().read_bytes() if self.image_list else b""
        digest = hashlib.sha256(facts.encode() + numbers.astype("<i8").tobytes() + first.numpy().tobytes() + listed)
        return Chosen(self, numbers, list(stream.classes), digest.hexdigest())


@dataclass(frozen=True)
class Chosen:
    """numbers int64 [N]; the names of the classes; fingerprint: the same for the same images in the same order."""

    images: Images
    numbers: np.ndarray
    classes: list[str]
    fingerprint: str

    def batches(self, rows: np.ndarray, batch_size: int) -> Iterator[tuple[np.ndarray, Tensor, Tensor]]:
        """Rows (positions in numbers) with their images uint8 and labels, batch_size at a time, in the order given."""
        if len(rows):
            parts = [rows[i : i + batch_size] for i in range(0, len(rows), batch_size)]
            yield from (
                (part, *batch) for part, batch in zip(parts, self.images.stream(batch_size, self.numbers[rows]))
            )

    def identity(self) -> dict:
        """For results.json."""
        names = ("dataset", "split", "input_size", "image_list")
        facts = {name: getattr(self.images, name) for name in names}
        return {**facts, "n": len(self.numbers), "classes": len(self.classes), "hash": self.fingerprint}
