"""Originals: the encoded images that a cache is made of, in class folders, tar files or an npz file.  N images."""

import hashlib
import io
import os
import tarfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import NamedTuple, Protocol

import numpy as np
from PIL import Image

from mimir_fast.data.archives import read_npz
from mimir_fast.data.datasets import FOLDERS, read_folders
from mimir_fast.data.errors import DataError
from mimir_fast.data.folders import BadImageError, ImageList, decode, decoded_size, read_image

# Endings of images in tar files.
TAR_IMAGES = ("jpg", "jpeg", "png")
# For the sizes of files, which a network file system tells slowly.
STAT_THREADS = 16
# Files that a thread asks for at a time.
STAT_PART = 1024


class Originals(Protocol):
    """Images by index.

    where     the folder or file, for messages
    labels    int64 [N]; classes: names in label order
    """

    where: str
    labels: np.ndarray
    classes: list[str]

    def __len__(self) -> int: ...

    def name(self, index: int) -> str:
        """The image's name in the source."""
        ...

    def read(self, index: int, ycc: bool = False) -> Image.Image:
        """The RGB image; with ycc in YCbCr where the file holds that.  Raises BadImageError."""
        ...

    def size(self, index: int) -> tuple[int, int]:
        """(width, height), without decoding.  Raises BadImageError."""
        ...

    def contents(self) -> list:
        """What tells each image from others of its name: its bytes or a checksum."""
        ...


def fingerprint(originals: Originals) -> str:
    """Of names, labels and contents: the same for the same source, wherever it lies."""
    digest = hashlib.sha256(repr(originals.classes).encode())
    for index, content in enumerate(originals.contents()):
        line = f"{originals.name(index)}\0{originals.labels[index]}\0{content}\n"
        digest.update(line.encode(errors="surrogateescape"))
    return digest.hexdigest()


def open_originals(src: str | Path, split: str) -> Originals:
    """The images of a split: class folders as --data_root takes them, a tar, a folder of tars, or an npz.

    Raises DataError naming the folder or file.
    """
    root = Path(src).expanduser()
    if root.suffix == ".npz":
        return ArrayOriginals(root)
    if root.is_file():
        return TarOriginals(root, [root])
    if not root.is_dir():
        raise DataError(f"src: {root}: no such file or folder")
    for folder in (root / split, root):
        if tars := sorted(folder.glob("*.tar")):
            return TarOriginals(folder, tars)
    inner = root / FOLDERS["imagenette"]
    return FolderOriginals(read_folders(inner if inner.is_dir() else root, split, optional_train=True).files)


class FolderOriginals:
    """Images in class folders, in the order in which training reads them."""

    def __init__(self, files: ImageList):
        self.files, self.labels, self.classes = files, files.labels, files.classes
        self.where = files.paths.root

    def __len__(self) -> int:
        return len(self.files)

    def name(self, index: int) -> str:
        return self.files.paths.relative(index)

    def read(self, index: int, ycc: bool = False) -> Image.Image:
        return read_image(self.files.paths[index], ycc=ycc)

    def size(self, index: int) -> tuple[int, int]:
        path = self.files.paths[index]
        return decoded_size(lambda: open(path, "rb"))

    def contents(self) -> list:
        # Sizes, and no checksums: these would have every file read before the first one is decoded.
        with ThreadPoolExecutor(STAT_THREADS) as pool:
            parts = pool.map(self._bytes, range(0, len(self), STAT_PART))
            return [count for part in parts for count in part]

    def _bytes(self, first: int) -> list[int]:
        """Of STAT_PART files; -1 for a link to nothing, an unreadable image like others."""
        sizes = []
        for index in range(first, min(first + STAT_PART, len(self))):
            try:
                sizes.append(os.path.getsize(self.files.paths[index]))
            except OSError:
                sizes.append(-1)
        return sizes


class Member(NamedTuple):
    """An image in a tar: which tar, its name there, place and size in bytes."""

    tar: int
    name: str
    offset: int
    bytes: int


class TarOriginals:
    """Images KEY.jpg, .jpeg or .png of uncompressed tar files, with the number of their class in KEY.cls beside them.

    In the order of the files' names and of the members in them.
    """

    def __init__(self, where: Path, tars: list[Path]):
        self.where, self.tars = str(where), tars
        self.members: list[Member] = []
        labels: list[int] = []
        for number, path in enumerate(tars):
            members, theirs = _tar_members(path, number)
            self.members += members
            labels += theirs
        if not self.members:
            raise DataError(f"{where}: no images KEY.jpg, .jpeg or .png with KEY.cls")
        self.labels = np.array(labels, np.int64)
        self.classes = [str(label) for label in range(max(labels) + 1)]

    def __len__(self) -> int:
        return len(self.members)

    def name(self, index: int) -> str:
        member = self.members[index]
        return f"{self.tars[member.tar].name}/{member.name}"

    def _open(self, index: int) -> io.BytesIO:
        member = self.members[index]
        # Opened for each image: forked processes share the position of a file that was open before.
        with self.tars[member.tar].open("rb") as file:
            file.seek(member.offset)
            return io.BytesIO(file.read(member.bytes))

    def read(self, index: int, ycc: bool = False) -> Image.Image:
        return decode(lambda: self._open(index), ycc=ycc)

    def size(self, index: int) -> tuple[int, int]:
        return decoded_size(lambda: self._open(index))

    def contents(self) -> list:
        return [member.bytes for member in self.members]


def _tar_members(path: Path, number: int) -> tuple[list[Member], list[int]]:
    """The images of one tar and their labels."""
    images: dict[str, Member] = {}
    classes: dict[str, int] = {}
    try:
        # "r:" refuses compression, since members of a compressed tar have no place in it to seek to.
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                # As WebDataset does: the key ends at the first dot of the name.
                key, _, ending = PurePosixPath(member.name).name.partition(".")
                key = str(PurePosixPath(member.name).parent / key)
                if member.isfile() and ending.lower() in TAR_IMAGES:
                    images[key] = Member(number, member.name, member.offset_data, member.size)
                elif member.isfile() and ending == "cls" and (file := tar.extractfile(member)):
                    classes[key] = int(file.read())
    except (tarfile.TarError, OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise DataError(f"{path}: not an uncompressed tar of images and class numbers ({reason})") from error
    for key, image in images.items():
        if classes.get(key, -1) < 0:
            raise DataError(f"{path}: {image.name} has no class number; expected {key}.cls beside it")
    return list(images.values()), [classes[key] for key in images]


class ArrayOriginals:
    """Images of an npz file: image uint8 [N,H,W,3], label int [N]."""

    def __init__(self, path: Path):
        arrays = read_npz(path, "src")
        self.where, self.images, self.labels = str(path), arrays.images, arrays.labels
        if self.labels.min() < 0:
            raise DataError(f"src: {path}: label {self.labels.min()}, expected 0 or more")
        self.classes = [str(label) for label in range(int(self.labels.max()) + 1)]

    def __len__(self) -> int:
        return len(self.images)

    def name(self, index: int) -> str:
        return str(index)

    def read(self, index: int, ycc: bool = False) -> Image.Image:
        return Image.fromarray(self.images[index])

    def size(self, index: int) -> tuple[int, int]:
        return self.images.shape[2], self.images.shape[1]

    def contents(self) -> list:
        return [hashlib.sha256(image.tobytes()).hexdigest() for image in self.images]


def sampled_bytes(originals: Originals, count: int, stored_bytes) -> float:
    """Mean of stored_bytes(width, height) over at most `count` images spread evenly, from their headers."""
    sizes = []
    for index in np.linspace(0, len(originals) - 1, min(count, len(originals))).astype(int).tolist():
        try:
            sizes.append(stored_bytes(*originals.size(index)))
        except BadImageError:
            continue
    return float(np.mean(sizes)) if sizes else 0.0
