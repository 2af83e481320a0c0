"""Images by index, in memory or on disk.  Shapes: B batch, N images, H W sides, C = 3 channels."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from PIL import Image

from mimir_fast.data.errors import BadFiles, DataError, log
from mimir_fast.data.folders import BadImageError, ImageList, read_image


class Taken(NamedTuple):
    """Images uint8 [B,H,W,C], labels int64 [B], and the unreadable files met on the way, path -> reason."""

    images: np.ndarray
    labels: np.ndarray
    bad: dict[str, str]


class TooManyBadError(Exception):
    """Unreadable files, path -> reason, too many to go on; the main process reports them."""

    def __init__(self, bad: dict[str, str]):
        super().__init__(bad)
        self.bad = bad


class ArrayImages:
    """Images in memory: uint8 [N,H,W,C], labels int64 [N]; `bad` accounts for files left out while loading.

    classes   names in label order, None where the data does not tell
    """

    def __init__(
        self, images: np.ndarray, labels: np.ndarray, bad: BadFiles | None = None, classes: list[str] | None = None
    ):
        self.images, self.classes = images, classes
        self.labels = np.asarray(labels, np.int64)
        self.bad = bad or BadFiles("memory", len(images))

    def __len__(self) -> int:
        return len(self.images)

    def take(self, indices: np.ndarray) -> Taken:
        """The images and labels of indices [B]."""
        return Taken(self.images[indices], self.labels[indices], {})

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

    def take(self, indices: np.ndarray) -> Taken:
        """The images and labels of indices [B]."""
        is_real = indices < len(self.real)
        images = np.empty((len(indices), *self.real.images.shape[1:]), np.uint8)
        labels = np.empty(len(indices), np.int64)
        for where, part, first in ((is_real, self.real, 0), (~is_real, self.generated, len(self.real))):
            images[where], labels[where], _ = part.take(indices[where] - first)
        return Taken(images, labels, {})


class FolderImages:
    """Images read from disk when asked for; all side x side pixels if `side` is given.

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

    def take(self, indices: np.ndarray, convert: Callable[[Image.Image], np.ndarray] = np.asarray) -> Taken:
        """Decode indices [B]; convert: RGB image -> uint8 [H,W,C], called in the order of the indices.

        Raises TooManyBadError once this batch alone has met more unreadable files than may be.
        """
        images, chosen, bad = [], [], {}
        for index in indices:
            index, image = self._first_readable(int(index), bad)
            chosen.append(index)
            images.append(convert(image))
        return Taken(np.stack(images), self.labels[chosen], bad)

    def _first_readable(self, index: int, bad: dict[str, str]) -> tuple[int, Image.Image]:
        """The first readable image from index on; unreadable ones are added to `bad`."""
        while len(bad) <= self.bad.limit:
            path = self.files.paths[index]
            try:
                return index, read_image(path, self.side)
            except BadImageError as error:
                bad[path] = str(error)
            index = (index + 1) % len(self)
        raise TooManyBadError(bad)


def decode_all(folder: FolderImages) -> ArrayImages:
    """Decode a folder of equally large images into memory once, leaving unreadable ones out.

    Raises DataError when too many are unreadable.
    """
    log.info("decoding %d images of %s", len(folder), folder.bad.where)
    images = np.empty((len(folder), folder.side, folder.side, 3), np.uint8)
    kept = []
    for index in range(len(folder)):
        path = folder.files.paths[index]
        try:
            images[len(kept)] = np.asarray(read_image(path, folder.side))
            kept.append(index)
        except BadImageError as error:
            folder.bad.record({path: str(error)})
    return ArrayImages(images[: len(kept)], folder.labels[kept], folder.bad, folder.classes)
