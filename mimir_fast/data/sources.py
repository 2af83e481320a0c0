"""Image sources: images by index, in memory or on disk.  Shapes: B batch, N images, H W sides, C = 3 channels."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from PIL import Image

from mimir_fast.data.errors import BadFiles, DataError, log
from mimir_fast.data.folders import BadImageError, ImageList, read_image

# RGB image -> uint8 [H,W,C].
Convert = Callable[[Image.Image], np.ndarray]


class Taken(NamedTuple):
    """Images uint8 [B,H,W,C], labels int64 [B], and the unreadable files met on the way, path -> reason."""

    images: np.ndarray
    labels: np.ndarray
    bad: dict[str, str]


class TooManyBadError(Exception):
    """Too many unreadable files in one batch, path -> reason; the main process reports them."""

    def __init__(self, bad: dict[str, str]):
        super().__init__(bad)
        self.bad = bad


class ArrayImages:
    """Images in memory: uint8 [N,H,W,C], labels int64 [N].

    bad       unreadable files that were left out while loading
    classes   names in label order, None where the files hold none
    """

    def __init__(
        self, images: np.ndarray, labels: np.ndarray, bad: BadFiles | None = None, classes: list[str] | None = None
    ):
        self.images, self.classes = images, classes
        self.labels = np.asarray(labels, np.int64)
        self.bad = bad or BadFiles("memory", len(images))

    def __len__(self) -> int:
        return len(self.images)

    def take(self, indices: np.ndarray, convert: Convert | None = None) -> Taken:
        """The images and labels of indices [B]; convert: applied to each image, in the order of the indices."""
        return Taken(_converted(self.images[indices], convert), self.labels[indices], {})

    def select(self, indices: np.ndarray) -> "ArrayImages":
        """A copy of some of the images."""
        return ArrayImages(self.images[indices], self.labels[indices], self.bad, self.classes)


class MixedImages:
    """Real images [0, N) followed by generated ones [N, N + M), without joining the two arrays.

    Raises DataError naming the generated file when the images differ in shape.
    """

    def __init__(self, real: ArrayImages, generated: ArrayImages, generated_name: str):
        if generated.images.shape[1:] != real.images.shape[1:]:
            raise DataError(
                f"aux_data_filename: images in {generated_name} have shape {generated.images.shape[1:]}, "
                f"the real ones {real.images.shape[1:]}; give images generated for this data set"
            )
        self.real, self.generated, self.bad = real, generated, real.bad

    def __len__(self) -> int:
        return len(self.real) + len(self.generated)

    def take(self, indices: np.ndarray, convert: Convert | None = None) -> Taken:
        """The images and labels of indices [B]; convert: applied to each image, in the order of the indices."""
        is_real = indices < len(self.real)
        images = np.empty((len(indices), *self.real.images.shape[1:]), np.uint8)
        labels = np.empty(len(indices), np.int64)
        for where, part, first in ((is_real, self.real, 0), (~is_real, self.generated, len(self.real))):
            images[where], labels[where], _ = part.take(indices[where] - first)
        return Taken(_converted(images, convert), labels, {})


def _converted(images: np.ndarray, convert: Convert | None) -> np.ndarray:
    return images if convert is None else np.stack([convert(Image.fromarray(image)) for image in images])


class FolderImages:
    """Images that `take` reads from disk; all side x side pixels if `side` is given.

    An unreadable one is replaced by the next readable one, in path order.
    """

    def __init__(self, files: ImageList, where: str, side: int | None = None):
        self.files, self.labels, self.side, self.classes = files, files.labels, side, files.classes
        self.bad = BadFiles(where, len(files))

    def __len__(self) -> int:
        return len(self.files)

    def select(self, indices: np.ndarray) -> "FolderImages":
        """Some of the images; unreadable ones are replaced from among these."""
        paths = self.files.paths.select(indices)
        return FolderImages(ImageList(paths, self.labels[indices], self.classes), self.bad.where, self.side)

    def take(self, indices: np.ndarray, convert: Convert | None = None) -> Taken:
        """Decode the images of indices [B]; convert: applied to each image, in the order of the indices.

        Raises TooManyBadError once this batch alone has met more unreadable files than may be.
        """
        images, chosen = [], []
        bad: dict[str, str] = {}
        for index in indices:
            readable, image = self._first_readable(int(index), bad)
            chosen.append(readable)
            # Converted one by one: decoded images of a batch may differ in size, and together take much memory.
            images.append(np.asarray(image) if convert is None else convert(image))
        return Taken(np.stack(images), self.labels[chosen], bad)

    def _first_readable(self, index: int, bad: dict[str, str]) -> tuple[int, Image.Image]:
        """The first readable image from index on; unreadable ones are added to `bad`."""
        while len(bad) <= self.bad.limit:
            path = self.files.paths[index]
            try:
                return index, read_image(path, self.side)
            except BadImageError as error:
                bad[path] = str(error)
            # Paths are sorted by class: the next image is most often of the same one.
            index = (index + 1) % len(self)
        raise TooManyBadError(bad)


def decode_all(folder: FolderImages) -> ArrayImages:
    """Decode a folder whose images have one size into memory, leaving unreadable ones out.

    Raises DataError when too many are unreadable, ValueError for a folder without a side.
    """
    side = folder.side
    if side is None:
        raise ValueError("side: expected that of all images in pixels, got None")
    log.info("decoding %d images of %s", len(folder), folder.bad.where)
    # Allocated once: a list of arrays and their stack would take twice the memory.
    images = np.empty((len(folder), side, side, 3), np.uint8)
    kept: list[int] = []
    for index in range(len(folder)):
        path = folder.files.paths[index]
        try:
            images[len(kept)] = np.asarray(read_image(path, side))
            kept.append(index)
        except BadImageError as error:
            folder.bad.record({path: str(error)})
    return ArrayImages(images[: len(kept)], folder.labels[kept], folder.bad, folder.classes)
