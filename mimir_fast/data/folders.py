"""Class folders: finding images and decoding them."""

import os
import struct
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, UnidentifiedImageError

from mimir_fast.data.decoding import BadImageError, to_rgb, to_ycc_or_rgb
from mimir_fast.data.errors import DataError, log

IMAGE_EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
# Folders that systems and programs put beside a user's own, in small letters; hidden ones begin with a dot.
SYSTEM_FOLDERS = (
    "__macosx",
    "__pycache__",
    "@eadir",
    "#recycle",
    "$recycle.bin",
    "system volume information",
    "lost+found",
)
# What Pillow's decoders raise on damaged files.
DECODE_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    IndexError,
    TypeError,
    OverflowError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)


# Of a folder: device and number.
Identity = tuple[int, int]


class PathTable:
    """Many paths below one root, stored in two arrays."""

    # Forked workers share the pages of arrays.  Strings have reference counts: reading one writes to its page, so that in the
    # end every worker would hold a copy of all paths (1.3 million of ImageNet).
    def __init__(self, root: str | Path, relative: list[str]):
        encoded = [os.fsencode(path) for path in relative]
        self.root = os.fspath(root)
        self.ends = np.cumsum([0, *map(len, encoded)])
        self.text = np.frombuffer(b"".join(encoded), np.uint8)

    @classmethod
    def of(cls, root: str | Path, ends: np.ndarray, text: np.ndarray) -> "PathTable":
        """A table of the arrays of another one."""
        table = cls(root, [])
        table.ends, table.text = ends, text
        return table

    def __len__(self) -> int:
        return len(self.ends) - 1

    def __getitem__(self, index: int) -> str:
        return os.path.join(self.root, self.relative(index))

    def relative(self, index: int) -> str:
        """The path below the root."""
        return os.fsdecode(self.text[self.ends[index] : self.ends[index + 1]].tobytes())

    def select(self, indices: np.ndarray) -> "PathTable":
        """A table of some of the paths."""
        return PathTable(self.root, [self.relative(index) for index in indices])


@dataclass(frozen=True)
class ImageList:
    """Files of one split: paths, labels int64 [N], and the class names in label order."""

    paths: PathTable
    labels: np.ndarray
    classes: list[str]

    def __len__(self) -> int:
        return len(self.paths)


def class_folders(root: Path) -> list[str]:
    """Names of the folders directly below root, sorted; hidden and system folders and links to root are left out.

    Raises DataError when root is missing or holds no folders.
    """
    if not root.is_dir():
        raise DataError(f"{root}: no such folder; check data_root, which must contain one folder of images per class")
    try:
        folders = [entry for entry in os.scandir(root) if entry.is_dir() and not _hidden(entry.name)]
        above = _with_parents(root)
        names = sorted(entry.name for entry in folders if not entry.is_symlink() or _identity(entry.path) not in above)
    except OSError as error:
        _unreadable_folder(error)
    if not names:
        raise DataError(f"{root}: no class folders; data_root must contain one folder of images per class")
    return names


def scan_class_folders(
    root: Path, classes: list[str] | None = None, skip: tuple[str, ...] = (), expected: tuple[str, ...] = ()
) -> ImageList:
    """All images below root/CLASS, at any depth, sorted by path; other files are ignored and reported once.

    Hidden and system folders are left out at every depth.  Links are followed, to each folder once, and not upwards.
    classes    class names in label order (default: the folders found); a folder outside them is an error
    skip       folders that are not classes
    expected   endings of other files that need no report
    Raises DataError for a missing root, no classes, an empty class folder (named) or an unknown class.
    """
    names = [name for name in class_folders(root) if name not in skip]
    label_of = {name: label for label, name in enumerate(names if classes is None else classes)}
    relative: list[str] = []
    labels: list[int] = []
    others: list[str] = []
    above = _with_parents(root)
    for name in names:
        if name not in label_of:
            raise DataError(f"{root / name}: the training images have no class of this name; remove the folder")
        images = _images_below(root, name, expected, others, above)
        if not images:
            raise DataError(f"{root / name}: class folder without images; remove it or fill it")
        relative += images
        labels += [label_of[name]] * len(images)
    if others:
        log.warning("%s: ignored %d files without an image extension, first %s", root, len(others), others[0])
    return ImageList(PathTable(root, relative), np.array(labels, np.int64), list(label_of))


def _images_below(
    root: Path, name: str, expected: tuple[str, ...], others: list[str], above: frozenset[Identity]
) -> list[str]:
    """Paths of the images in root/name relative to root; other files are appended to `others`."""
    images = []
    # Sorted: the order in which a file system lists files differs between machines, and would change every batch.
    for folder, files in sorted(_walk(root / name, above)):
        below = os.path.relpath(folder, root)
        for file in sorted(file for file in files if not file.startswith(".")):
            if file.lower().endswith(IMAGE_EXTENSIONS):
                images.append(os.path.join(below, file))
            elif not file.endswith(expected):
                others.append(os.path.join(below, file))
    return images


def _walk(top: Path, above: frozenset[Identity]) -> Iterator[tuple[str, list[str]]]:
    """Every folder from top downwards with its files, each once, however many links lead to it; none of `above`."""
    seen = set(above)
    for folder, folders, files in os.walk(top, onerror=_unreadable_folder, followlinks=True):
        identity = _identity(folder)
        if identity in seen:
            folders.clear()
            continue
        seen.add(identity)
        # In order: which of several links is followed must not depend on the machine.
        folders[:] = sorted(name for name in folders if not _hidden(name))
        yield folder, files


def _hidden(name: str) -> bool:
    return name.startswith(".") or name.lower() in SYSTEM_FOLDERS


def _identity(folder: str | Path) -> Identity:
    """What all links to a folder share."""
    found = os.stat(folder)
    return found.st_dev, found.st_ino


def _with_parents(folder: Path) -> frozenset[Identity]:
    """A folder and all above it."""
    real = folder.resolve()
    return frozenset(map(_identity, (real, *real.parents)))


def _unreadable_folder(error: OSError) -> None:
    raise DataError(f"{error.filename}: cannot list this folder ({error.strerror}); check its permissions") from error


def read_image(path: str, side: int | None = None, ycc: bool = False) -> Image.Image:
    """Decode one image to RGB; with ycc to YCbCr where the file holds that.

    Raises BadImageError when that fails, or when it is not side x side pixels.
    """
    return decode(lambda: open(path, "rb"), side, ycc)


def decode(open_file: Callable[[], BinaryIO], side: int | None = None, ycc: bool = False) -> Image.Image:
    """Decode one image, wherever it comes from; see read_image."""
    with _decoding(open_file) as image:
        rgb = to_ycc_or_rgb(image) if ycc else to_rgb(image)
    if side is not None and rgb.size != (side, side):
        raise BadImageError(f"{rgb.width}x{rgb.height} pixels, expected {side}x{side}")
    return rgb


def decoded_size(open_file: Callable[[], BinaryIO]) -> tuple[int, int]:
    """(width, height) of an image, from its first bytes alone.  Raises BadImageError."""
    with _decoding(open_file) as image:
        return image.size


@contextmanager
def _decoding(open_file: Callable[[], BinaryIO]) -> Iterator[Image.Image]:
    """Context of an open image, in which what Pillow raises becomes BadImageError."""
    try:
        with open_file() as file:
            # What an interrupted copy or download leaves, and worth its own word.
            if not file.read(1):
                raise BadImageError("empty file")
            file.seek(0)
            with Image.open(file) as image:
                yield image
    except UnidentifiedImageError as error:
        raise BadImageError("not an image") from error
    except DECODE_ERRORS as error:
        raise BadImageError(" ".join(f"{type(error).__name__}: {error}".split())) from error
