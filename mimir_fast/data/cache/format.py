"""Files of a cache: manifest.json, and the names of the others.

DST/SPLIT holds
    manifest.json       what the cache is made of, written last: without it a folder is no cache
    index-NAME.npy      arrays of the fields of Index (index.py)
    shard-00000.bin     the images' rows one after the other, `shard_images` images a shard
"""

import hashlib
import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path

from mimir_fast.checkpoints.atomic import write_text_atomically
from mimir_fast.data.cache.pixels import PIXELS
from mimir_fast.data.errors import DataError

VERSION = 1
MANIFEST = "manifest.json"
# Names of its other files.
FILE = re.compile(r"shard-\d{5,}\.bin|index-\w+\.npy")
AGAIN = "remove the folder and make it again with mimir-fast cache"


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
    # Keys stay in their order through JSON and back: the text is the same when it is written and when it is read.
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def shard_name(shard: int) -> str:
    """File of a shard."""
    return f"shard-{shard:05d}.bin"


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
        # Before the checksum, which a later version may compute in another way.
        if content["version"] > VERSION:
            raise DataError(
                f"{path}: a cache of format {content['version']}, this version of mimir-fast reads up to {VERSION}; update it"
            )
        if content.pop("checksum") != _checksum(content):
            raise ValueError("its checksum differs")
        del content["format"], content["version"]
        manifest = Manifest(options=Options(**content.pop("options")), **content)
        # Staging removes and writes files of these names: none may lead out of the folder.
        if not all(FILE.fullmatch(name) for name in manifest.files):
            raise ValueError("it names files that are none of a cache")
    except DataError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path}: damaged ({' '.join(str(error).split())}); {AGAIN}") from error
    if manifest.options.pixels not in PIXELS:
        raise DataError(f"{path}: pixels {manifest.options.pixels!r}, expected one of {', '.join(PIXELS)}; {AGAIN}")
    return manifest


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
