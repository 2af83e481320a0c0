"""Fingerprints of images: of names and labels, which decide a run's order of images, and of their content.

The same for the same images wherever they lie, whenever they were copied.
"""

import hashlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from mimir_fast.data.cache.images import CachedImages
from mimir_fast.data.errors import DataError
from mimir_fast.data.folders import PathTable
from mimir_fast.data.sources import ArrayImages, FolderImages, MixedImages

# A disk, a network file system above all, answers many requests at a time faster than one.
READERS = 16
# Images that are hashed at a time.
PART = 1024


def _paths(source: ArrayImages | FolderImages | CachedImages) -> PathTable | None:
    """The images' names, None for images in memory, which have none."""
    if isinstance(source, CachedImages):
        return source.names()
    return source.files.paths if isinstance(source, FolderImages) else None


def names_fingerprint(source: ArrayImages | FolderImages | CachedImages | MixedImages) -> str:
    """The number of images, and a hash of names, where they have names, and labels in their order."""
    digest = hashlib.sha256(str(len(source)).encode())
    for part in (source.real, source.generated) if isinstance(source, MixedImages) else (source,):
        digest.update(part.labels.astype("<i8").tobytes())
        if (paths := _paths(part)) is not None:
            # With the ends: the joined text alone does not say where one name stops.
            digest.update(paths.text.tobytes() + paths.ends.astype("<i8").tobytes())
    return f"{len(source)}-{digest.hexdigest()[:16]}"


def content_fingerprint(
    source: ArrayImages | FolderImages | CachedImages,
    indices: np.ndarray,
    read: Callable[[int], None] = lambda count: None,
) -> str:
    """A hash of name, label and content of each image of `indices`, in their order: of files their bytes, of a cache checksums.

    read   called with the number of images that were read since the last call
    Raises DataError for a file that cannot be read.
    """
    digest, paths = hashlib.sha256(), _paths(source)
    for start in range(0, len(indices), PART):
        part = indices[start : start + PART]
        for index, content in zip(part, _contents(source, part)):
            name = "" if paths is None else paths.relative(int(index))
            # Zero bytes in between, which no name can hold: no other name and label are written alike.
            digest.update(f"{name}\0{source.labels[index]}\0".encode(errors="surrogateescape") + content)
        read(len(part))
    return digest.hexdigest()


def _contents(source: ArrayImages | FolderImages | CachedImages, indices: np.ndarray) -> Iterator[bytes]:
    """The hash of each image."""
    if isinstance(source, CachedImages):
        yield from (crc.tobytes() for crc in source.cache.index.crc[source.shown[indices]].astype("<u4"))
        return
    if isinstance(source, FolderImages):
        with ThreadPoolExecutor(READERS) as pool:
            yield from pool.map(_hash_of_file, [source.files.paths[int(index)] for index in indices])
    else:
        yield from (hashlib.sha256(image.tobytes()).digest() for image in source.images[indices])


def _hash_of_file(path: str) -> bytes:
    try:
        with open(path, "rb") as file:
            return hashlib.sha256(file.read()).digest()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); replace or remove it") from error
