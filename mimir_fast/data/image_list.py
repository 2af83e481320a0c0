"""Image lists: a selection of images by a file of their paths, such as RobustBench's 5000 images of ImageNet."""

from pathlib import Path, PurePosixPath

import numpy as np

from mimir_fast.data.cache.format import find_cache
from mimir_fast.data.cache.images import CachedImages
from mimir_fast.data.cache.shards import Cache, open_cache
from mimir_fast.data.datasets import FOLDERS, folder_of
from mimir_fast.data.errors import DataError
from mimir_fast.data.folders import ImageList, PathTable
from mimir_fast.data.sources import FolderImages


def listed_images(
    dataset: str, data_root: str | Path, split: str, image_list: str | Path
) -> FolderImages | CachedImages:
    """The images that a text file lists, in its order: one CLASS/.../FILE per line, below the split's folder or in its cache.

    Raises DataError, naming the list, if it cannot be read or an image or class is missing.
    """
    if dataset not in FOLDERS or split not in ("train", "val"):
        raise DataError(f"image_list: only for train or val of {', '.join(FOLDERS)}, not for {split} of {dataset}")
    lines = _lines(Path(image_list).expanduser())
    if (cached := find_cache(Path(data_root).expanduser(), split)) is not None:
        return _cached(open_cache(cached), lines, image_list)
    folder, classes = folder_of(dataset, data_root, split)
    label_of = {name: label for label, name in enumerate(classes)}
    for line in lines:
        if PurePosixPath(line).parts[0] not in label_of:
            raise DataError(f"image_list: {image_list}: {line} is in no class folder of {folder}")
    missing = [line for line in lines if not (folder / line).is_file()]
    _check_missing(missing, lines, image_list, folder)
    labels = np.array([label_of[PurePosixPath(line).parts[0]] for line in lines], np.int64)
    return FolderImages(ImageList(PathTable(folder, lines), labels, classes), str(folder))


def _cached(cache: Cache, lines: list[str], image_list: str | Path) -> CachedImages:
    """The images of a cache whose names in the source are the lines."""
    names = cache.index.names()
    row_of = {names.relative(row): row for row in range(len(names))}
    _check_missing([line for line in lines if line not in row_of], lines, image_list, cache.folder)
    return CachedImages(cache, np.array([row_of[line] for line in lines]))


def _check_missing(missing: list[str], lines: list[str], image_list: str | Path, folder: Path) -> None:
    if missing:
        count = f"{len(missing)} of {len(lines)}"
        raise DataError(f"image_list: {image_list}: {count} images are not in {folder}, first {missing[0]}")


def _lines(path: Path) -> list[str]:
    """Relative paths without duplicates; blank lines do not count."""
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"image_list: {path} cannot be read ({error})") from error
    lines = [PurePosixPath(line).as_posix() for line in lines if line]
    if not lines:
        raise DataError(f"image_list: {path} names no images")
    seen = set()
    for line in lines:
        # A list can come from anywhere: it must not lead out of the folder.
        if line == "." or PurePosixPath(line).is_absolute() or ".." in PurePosixPath(line).parts:
            raise DataError(f"image_list: {path}: {line}: expected a path below the folder of the images")
        if line in seen:
            raise DataError(f"image_list: {path} names {line} twice")
        seen.add(line)
    return lines
