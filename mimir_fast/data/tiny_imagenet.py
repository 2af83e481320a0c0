"""Tiny-ImageNet: as downloaded, rearranged into class folders, or as arrays in train.npz and val.npz."""

from pathlib import Path

import numpy as np

from mimir_fast.data.archives import read_npz
from mimir_fast.data.errors import DataError
from mimir_fast.data.folders import IMAGE_EXTENSIONS, ImageList, PathTable, class_folders, scan_class_folders
from mimir_fast.data.sources import ArrayImages, FolderImages, decode_all

SIDE = 64
FOLDER = "tiny-imagenet-200"
ANNOTATIONS = "val_annotations.txt"


def read(data_root: Path, split: str, in_memory: bool = False) -> ArrayImages | FolderImages:
    """Split "train" or "val" of data_root/tiny-imagenet-200, or of data_root itself if it holds the splits.

    in_memory  read train.npz or val.npz if it exists, else decode the folder; without in_memory a folder comes first
    Raises DataError for missing or damaged folders and files.
    """
    root = data_root / FOLDER if (data_root / FOLDER).is_dir() else data_root
    arrays = root / f"{split}.npz"
    if arrays.exists() and (in_memory or not (root / split).is_dir()):
        return _checked(read_npz(arrays, "data_root"), arrays)
    if not (root / split).is_dir():
        raise DataError(f"data_root: neither {data_root / FOLDER / split} nor {data_root / split} is a folder")
    files = _train_files(root) if split == "train" else _val_files(root)
    images = FolderImages(files, str(root / split), SIDE)
    return decode_all(images) if in_memory else images


def _checked(images: ArrayImages, path: Path) -> ArrayImages:
    if images.images.shape[1:3] != (SIDE, SIDE):
        height, width = images.images.shape[1:3]
        raise DataError(f"data_root: {path} holds images of {width}x{height} pixels, expected {SIDE}x{SIDE}")
    return images


def _train_files(root: Path) -> ImageList:
    """train/WNID/images/* as downloaded, or train/WNID/*."""
    # The download has a file of bounding boxes beside each class's images.
    return scan_class_folders(root / "train", expected=("_boxes.txt",))


def _val_files(root: Path) -> ImageList:
    """val/images/* with val_annotations.txt as downloaded, or rearranged: val/WNID/* or val/WNID/images/*."""
    # Labels are positions among the training classes, which the names in val may not all show.
    classes = class_folders(root / "train") if (root / "train").is_dir() else None
    images, annotations = root / "val" / "images", root / "val" / ANNOTATIONS
    as_downloaded = images.is_dir() and any(path.name.lower().endswith(IMAGE_EXTENSIONS) for path in images.iterdir())
    if not as_downloaded:
        return scan_class_folders(root / "val", classes, skip=("images",))
    if not annotations.is_file():
        raise DataError(f"{annotations}: no such file; it names the class of each image in {images}")
    pairs = [line.split("\t")[:2] for line in annotations.read_text(encoding="utf-8").splitlines() if line.strip()]
    return _annotated(images, annotations, pairs, classes)


def _annotated(images: Path, annotations: Path, pairs: list[list[str]], classes: list[str] | None) -> ImageList:
    """Images in the order of their annotations, pairs of file name and class name."""
    if not pairs or any(len(pair) != 2 for pair in pairs):
        raise DataError(f"{annotations}: expected a file name and a class per line, separated by a tab")
    names = classes if classes is not None else sorted({name for _, name in pairs})
    unknown = sorted({name for _, name in pairs} - set(names))
    if unknown:
        raise DataError(f"{annotations}: the training images have no class {unknown[0]}; check the folder train")
    label_of = {name: label for label, name in enumerate(names)}
    labels = np.array([label_of[name] for _, name in pairs], np.int64)
    return ImageList(PathTable(images, [file for file, _ in pairs]), labels, names)
