"""Images of a cache, in place of those of class folders."""

import numpy as np

from mimir_fast.data.cache.index import check_image, stand_ins
from mimir_fast.data.cache.pixels import to_image
from mimir_fast.data.cache.shards import Cache
from mimir_fast.data.errors import BadFiles
from mimir_fast.data.folders import PathTable
from mimir_fast.data.sources import Convert, Taken, TooManyBadError


class CachedImages:
    """Images that `take` reads from a cache; the images `rows` int64 [N] of it (default: all).

    cache     forked workers share its index and its open files
    classes   names in label order
    bad       images that were left out when the cache was made, as they are met
    """

    def __init__(self, cache: Cache, rows: np.ndarray | None = None):
        self.cache = cache
        self.rows = np.arange(len(cache.index)) if rows is None else rows
        self.left_out = {row: (name, reason) for row, name, reason in cache.manifest.left_out}
        # From among these images, as with class folders: what is held out does not stand for what is trained on.
        self.shown = self.rows[stand_ins(~np.isin(self.rows, list(self.left_out)))]
        self.labels = cache.index.label[self.shown]
        self.classes = cache.manifest.classes
        self.bad = BadFiles(str(cache.folder), len(self.rows))

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def origin(self) -> str:
        """Format, size, bytes per image and place of the cache, for the first lines of a run."""
        manifest = self.cache.manifest
        options, mean = manifest.options, int(self.cache.index.bytes(manifest.options.pixels).mean())
        size = f"for input {options.input_size}" if options.input_size else options.size or "size of the originals"
        return f"cache {options.pixels}, {size}, {mean / 1e3:.0f} KB an image, in {self.cache.folder}"

    def names(self) -> PathTable:
        """The images' names in the source."""
        names = self.cache.index.names()
        return names if len(self) == len(names) else names.select(self.rows)

    def select(self, indices: np.ndarray) -> "CachedImages":
        """Some of the images."""
        return CachedImages(self.cache, self.rows[indices])

    def unreadable(self, indices: np.ndarray) -> dict[str, str]:
        """Those of the images [B] that were left out when the cache was made: name -> reason."""
        if not self.left_out:
            return {}
        return dict(self.left_out[row] for row in self.rows[indices].tolist() if row in self.left_out)

    def take(self, indices: np.ndarray, convert: Convert | None = None) -> Taken:
        """The images and labels of indices [B]; convert: applied to each image, in the order of the indices.

        Raises TooManyBadError where too many were left out, DataError naming what cannot be read or is damaged.
        """
        bad = self.unreadable(indices)
        if len(bad) > self.bad.limit:
            raise TooManyBadError(bad)
        images = []
        # Converted one by one: images of a batch may differ in size, and together take much memory.
        for row in self.shown[indices].tolist():
            image = self._image(row)
            images.append(np.asarray(image) if convert is None else convert(image))
        return Taken(np.stack(images), self.labels[indices], bad)

    def _image(self, row: int):
        cache, index = self.cache, self.cache.index
        pixels, shard = cache.manifest.options.pixels, int(index.shard[row])
        height, width = index.stored[row].tolist()
        data = np.empty(int(index.bytes(pixels, row)), np.uint8)
        cache.shards.read(shard, int(index.offset[row]), data.data)
        check_image(cache.shards.path(shard), row, index, data)
        return to_image(data, pixels, height, width)
