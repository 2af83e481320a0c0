"""The index of a cache: where each image lies, as plain arrays.  N images."""

import io
import zlib
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import BinaryIO

import numpy as np

from mimir_fast.checkpoints.atomic import write_atomically
from mimir_fast.data.cache.format import AGAIN, Manifest
from mimir_fast.data.cache.pixels import stored_bytes
from mimir_fast.data.errors import DataError
from mimir_fast.data.folders import PathTable


@dataclass(frozen=True)
class Index:
    """Where each image lies; an image that was left out has the entries of the one that stands for it, and its own name.

    shard      int32 [N]
    offset     int64 [N], of the first byte in the shard
    stored     int32 [N,2], (height, width) in pixels
    original   int32 [N,2], before it was reduced
    label      int64 [N]
    crc        uint32 [N], CRC-32 of its bytes
    name_ends  int64 [N+1], name_text uint8: the names in the source, joined
    """

    shard: np.ndarray
    offset: np.ndarray
    stored: np.ndarray
    original: np.ndarray
    label: np.ndarray
    crc: np.ndarray
    name_ends: np.ndarray
    name_text: np.ndarray

    def __len__(self) -> int:
        return len(self.shard)

    def names(self) -> PathTable:
        """The images' names in the source."""
        return PathTable.of("", self.name_ends, self.name_text)

    def lying_in(self, shard: int) -> np.ndarray:
        """The images whose bytes are in a shard, in their order there, each once."""
        images = np.flatnonzero(self.shard == shard)
        return images[np.unique(self.offset[images], return_index=True)[1]]

    def bytes(self, pixels: str, rows=slice(None)) -> np.ndarray:
        """Bytes of each image, or of those of some rows, int64."""
        stored = self.stored[rows].astype(np.int64)
        return stored_bytes(pixels, stored[..., 0], stored[..., 1])


def index_name(field: str) -> str:
    """File of one array of the index."""
    return f"index-{field}.npy"


def joined(crcs: np.ndarray) -> int:
    """A shard's checksum: CRC-32 of its images' CRC-32s, each as four bytes, the lowest first."""
    return zlib.crc32(crcs.astype("<u4").tobytes())


def write_index(folder: Path, index: Index) -> dict[str, list[int]]:
    """Write the arrays; returns their entries of Manifest.files.  Raises OSError naming the file."""
    entries = {}
    for field in fields(Index):
        # Through memory: the checksum is then of what is meant, whatever the disk makes of it.
        buffer = io.BytesIO()
        # Without pickles, which run code when they are read: a cache may come from somebody else.
        np.save(buffer, getattr(index, field.name), allow_pickle=False)
        content = buffer.getvalue()
        write_atomically(folder / index_name(field.name), partial(_write, content), "dst")
        entries[index_name(field.name)] = [len(content), zlib.crc32(content)]
    return entries


def _write(content: bytes, file: BinaryIO) -> None:
    file.write(content)


def read_index(folder: Path, manifest: Manifest) -> Index:
    """The index of a cache.  Raises DataError naming the file that is missing, too short, too long or damaged."""
    arrays = {}
    for field in fields(Index):
        name = index_name(field.name)
        # Read once, so that the bytes that were compared with the checksum are those that are used.
        content = _content(folder / name)
        if [len(content), zlib.crc32(content)] != manifest.files.get(name):
            raise DataError(f"{folder / name}: damaged (its checksum differs from the manifest's); {AGAIN}")
        arrays[field.name] = np.load(io.BytesIO(content), allow_pickle=False)
    return Index(**arrays)


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); {AGAIN}") from error


def stand_ins(readable: np.ndarray) -> np.ndarray:
    """For each of N images, readable bool [N], the position of the one that is shown: itself or the next readable one."""
    whole = np.flatnonzero(readable)
    return whole[np.searchsorted(whole, np.arange(len(readable))) % len(whole)]


def check_image(path: Path, image: int, index: Index, data) -> None:
    """Raise DataError naming shard, index and source name unless `data` are the bytes of an image of the shard `path`."""
    if zlib.crc32(data) != index.crc[image]:
        name = index.names().relative(image)
        raise DataError(f"{path}: image {image} ({name}) is damaged, its checksum differs; {AGAIN}")
