"""Images of an evaluation, by their indices in the data set.  N images."""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from mimir_fast.data import EvalStream, eval_batches, subset_indices
from mimir_fast.data.fingerprints import content_fingerprint
from mimir_fast.evaluate.progress import Bar

# Seed of the choice of num_images.  Not that of the attacks: with other random starts the images must stay the same.
CHOICE = 0


@dataclass(frozen=True)
class Images:
    """Which images an evaluation uses, and how they are read: as in the validation of a training run.

    input_size   side of the centre crop, pixels
    num_images   a random choice of so many images, always the same ones; 0: all
    image_list   a file that lists the images, see eval_batches; None: all of the split
    held_out     number of images that the training held out, for split "held_out"
    eval_resize  crop, or none for images that have S x S pixels already
    """

    dataset: str
    data_root: str
    input_size: int
    split: str = "val"
    num_images: int = 0
    image_list: str | None = None
    held_out: int = 0
    num_workers: int = 0
    eval_resize: str = "crop"

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
            eval_resize=self.eval_resize,
        )

    def choose(self, say: Callable[[str], None] = print) -> "Chosen":
        """The indices of the images, their classes and a fingerprint, for which every image is read.

        say   called with a line of progress where that takes long
        Raises DataError as the data package does.
        """
        stream = self.stream(batch_size=1)
        total = stream.num_images
        indices = np.arange(total)
        # At random: class folders are sorted by class, and the first images would be of the first class.
        if self.num_images:
            indices = np.asarray(subset_indices(total, self.num_images, CHOICE), np.int64)
        facts = f"{self.dataset} {self.split} {self.input_size} {self.eval_resize} {list(stream.classes)} {total}"
        bar, done = Bar(say), 0

        def read(count: int) -> None:
            nonlocal done
            done += count
            bar.show("fingerprint of the images", f"{done}/{len(indices)} images", done, len(indices) - done)

        try:
            content = content_fingerprint(stream.source, indices, read)
        finally:
            bar.close()
        # Little-endian on every machine: the hash is compared across machines.
        # Names of class folders are bytes to the file system, and need not be UTF-8.
        digest = hashlib.sha256(f"{facts} {content}".encode(errors="surrogateescape") + indices.astype("<i8").tobytes())
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
        names = ("dataset", "split", "input_size", "eval_resize", "image_list")
        facts = {name: getattr(self.images, name) for name in names}
        return {**facts, "n": len(self.indices), "classes": len(self.classes), "hash": self.fingerprint}
