"""Files of a cache: manifest.json, the index and the shards.  N images.

DST/SPLIT holds
    manifest.json       what the cache is made of, written last: without it a folder is no cache
    index-NAME.npy      arrays of the fields of Index
    shard-00000.bin     the images' rows one after the other, `shard_images` images a shard
"""

import hashlib
import io
import json
import re
import zlib
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import BinaryIO

import numpy as np

from mimir_fast.checkpoints.atomic import write_atomically, write_text_atomically
from mimir_fast.data.cache.pixels import PIXELS, stored_bytes
from mimir_fast.data.errors import DataError
from mimir_fast.data.folders import PathTable

VERSION = 1
MANIFEST = "manifest.json"
# Names of its other files.
FILE = re.compile(r"shard-\d{5,}\.bin|index-\w+\.npy")
AGAIN = "remove the folder and make it again with mimir-fast cache"


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


@dataclass(frozen=True)
class Options:
    """What decides the bytes of a cache, beside its source.

    split         train or val
    pixels        a word of PIXELS
    size          the shorter side is reduced to so many pixels; 0: not at all
    input_size    side of the input that images of val were resized for; 0 for train
    shard_images  images of a shard
    """

    split: str
    pixels: str
    size: int
    input_size: int
    shard_images: int


@dataclass(frozen=True)
class Manifest:
    """What a cache is made of.

    source    where the images came from; source_fingerprint: of its names, labels and sizes
    classes   names in label order
    versions  of the package, Pillow and the decoder
    files     {name: [bytes, checksum]}: CRC-32 of a file of the index, for a shard that of its images' CRC-32s (`joined`)
    left_out  [index, name, reason] of every image that could not be read
    """

    options: Options
    source: str
    source_fingerprint: str
    num_images: int
    classes: list[str]
    versions: dict[str, str]
    files: dict[str, list[int]]
    left_out: list[list]

    def text(self) -> str:
        """The contents of manifest.json; its checksum is over the text without that line."""
        content = {"format": "mimir-fast cache", "version": VERSION, **asdict(self)}
        return json.dumps({"checksum": _checksum(content), **content}, indent=1) + "\n"

    @property
    def fingerprint(self) -> str:
        """The same for the same images in the same form, wherever they lie and came from."""
        return _checksum({"options": asdict(self.options), "classes": self.classes, "files": self.files})

    @property
    def shards(self) -> list[str]:
        """Names of the shards, in their order."""
        return sorted(name for name in self.files if name.startswith("shard-"))

    @property
    def bytes(self) -> int:
        """Of all files but the manifest."""
        return sum(size for size, _ in self.files.values())


def _checksum(content: dict) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def shard_name(shard: int) -> str:
    """File of a shard."""
    return f"shard-{shard:05d}.bin"


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
        buffer = io.BytesIO()
        np.save(buffer, getattr(index, field.name), allow_pickle=False)
        content = buffer.getvalue()
        write_atomically(folder / index_name(field.name), partial(_write, content), "dst")
        entries[index_name(field.name)] = [len(content), zlib.crc32(content)]
    return entries


def _write(content: bytes, file: BinaryIO) -> None:
    file.write(content)


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write the manifest, which makes the folder a cache.  Raises OSError naming the file."""
    write_text_atomically(folder / MANIFEST, manifest.text(), "dst")


def is_cache(folder: Path) -> bool:
    """Whether a folder is a cache, damaged or not."""
    return (folder / MANIFEST).is_file()


def find_cache(root: Path, split: str) -> Path | None:
    """The folder of a split's cache: root/split, or root itself; None if there is none.

    Raises DataError for one whose building did not end.
    """
    for folder in (root / split, root):
        if is_cache(folder) and (folder != root or read_manifest(folder).options.split == split):
            return folder
        if folder.is_dir() and not is_cache(folder) and any(folder.glob("shard-*.bin*")):
            raise DataError(f"{folder}: a cache that is not finished (no {MANIFEST}); run mimir-fast cache again")
    return None


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a cache.  Raises DataError naming the file if it is damaged or of another version."""
    path = folder / MANIFEST
    try:
        content = json.loads(path.read_bytes())
        if content["version"] > VERSION:
            raise DataError(
                f"{path}: a cache of format {content['version']}, this version of mimir-fast reads up to {VERSION}; update it"
            )
        if content.pop("checksum") != _checksum(content):
            raise ValueError("its checksum differs")
        del content["format"], content["version"]
        manifest = Manifest(options=Options(**content.pop("options")), **content)
        if not all(FILE.fullmatch(name) for name in manifest.files):
            raise ValueError("it names files that are none of a cache")
    except DataError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path}: damaged ({' '.join(str(error).split())}); {AGAIN}") from error
    if manifest.options.pixels not in PIXELS:
        raise DataError(f"{path}: pixels {manifest.options.pixels!r}, expected one of {', '.join(PIXELS)}; {AGAIN}")
    return manifest


def read_index(folder: Path, manifest: Manifest) -> Index:
    """The index of a cache.  Raises DataError naming the file that is missing, too short, too long or damaged."""
    arrays = {}
    for field in fields(Index):
        name = index_name(field.name)
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


def check_shards(folder: Path, manifest: Manifest) -> None:
    """Raise DataError naming the first shard that is missing or has another size than the manifest says."""
    for name, (size, _) in manifest.files.items():
        path = folder / name
        try:
            found = path.stat().st_size
        except OSError as error:
            raise DataError(f"{path}: cannot be read ({error.strerror}); {AGAIN}") from error
        if found != size:
            raise DataError(f"{path}: {found} bytes, the manifest says {size}; {AGAIN}")


def stand_ins(readable: np.ndarray) -> np.ndarray:
    """For each of N images, readable bool [N], the position of the one that is shown: itself or the next readable one."""
    whole = np.flatnonzero(readable)
    return whole[np.searchsorted(whole, np.arange(len(readable))) % len(whole)]


def check_image(path: Path, image: int, index: Index, data) -> None:
    """Raise DataError naming shard, index and source name unless `data` are the bytes of an image of the shard `path`."""
    if zlib.crc32(data) != index.crc[image]:
        name = index.names().relative(image)
        raise DataError(f"{path}: image {image} ({name}) is damaged, its checksum differs; {AGAIN}")
