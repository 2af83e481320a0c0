"""Supported data sets: their constants, and where their images lie below data_root."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from mimir_fast.data import archives, tiny_imagenet
from mimir_fast.data.cache.format import find_cache
from mimir_fast.data.cache.images import CachedImages
from mimir_fast.data.cache.shards import open_cache
from mimir_fast.data.crops import Channels
from mimir_fast.data.errors import DataError
from mimir_fast.data.folders import class_folders, scan_class_folders
from mimir_fast.data.sources import ArrayImages, FolderImages, decode_all

Source = ArrayImages | FolderImages | CachedImages

# Of ImageNet's training images in [0,1], per channel; also used for its subsets and for folders of images.
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class DatasetInfo:
    """Constants of a data set.

    mean, std     per channel, of images in [0,1]
    side          of all images, pixels; None where images differ in size and are cropped at random scales
    num_classes   None where the class folders tell
    input_size    the usual one, pixels; None where there is none
    flip          whether images may be mirrored
    edm           whether they can be mixed with generated images
    """

    mean: Channels
    std: Channels
    side: int | None
    num_classes: int | None
    input_size: int | None
    flip: bool = True
    edm: bool = False


INFO = {
    "imagenet": DatasetInfo(IMAGENET_MEAN, IMAGENET_STD, None, 1000, 224),
    "imagenette": DatasetInfo(IMAGENET_MEAN, IMAGENET_STD, None, 10, 224),
    "imagefolder": DatasetInfo(IMAGENET_MEAN, IMAGENET_STD, None, None, None),
    "cifar10": DatasetInfo((0.4914, 0.4822, 0.4465), (0.2471, 0.2435, 0.2616), 32, 10, 32, edm=True),
    "cifar100": DatasetInfo((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761), 32, 100, 32, edm=True),
    "svhn": DatasetInfo((0.4377, 0.4438, 0.4728), (0.1980, 0.2010, 0.1970), 32, 10, 32, edm=True),
    "tiny-imagenet": DatasetInfo(IMAGENET_MEAN, IMAGENET_STD, 64, 200, 64, edm=True),
    # Mirrored digits are other digits, or none.
    "digits": DatasetInfo((0.5, 0.5, 0.5), (0.5, 0.5, 0.5), 32, 10, 32, flip=False),
}
DATASETS = tuple(INFO)
# Folders beside class folders that are no classes, where there is no folder train.
OTHER_SPLITS = ("val", "valid", "validation", "test")
# Data sets of images of any size, and their folder below data_root.
FOLDERS = {"imagenet": "", "imagenette": "imagenette2", "imagefolder": ""}


def dataset_info(dataset: str) -> DatasetInfo:
    """Constants of a data set.  Raises DataError for an unknown name."""
    if dataset not in INFO:
        raise DataError(f"dataset: unknown name {dataset!r}, expected one of {', '.join(DATASETS)}")
    return INFO[dataset]


def read_images(dataset: str, data_root: str | Path, split: str = "train", in_memory: bool = False) -> Source:
    """The images of a split, "train" or "val"; for images of any size data_root may be that of a cache.

    in_memory   also decode Tiny-ImageNet, which is otherwise read from disk as needed
    Raises DataError for an unknown name or split, and for everything wrong with the files.
    """
    dataset_info(dataset)
    if split not in ("train", "val"):
        raise DataError(f"split: expected train or val, got {split!r}")
    root = Path(data_root).expanduser()
    if dataset == "digits":
        return archives.read_digits(split)
    if (folder := find_cache(root, split)) is not None:
        if dataset not in FOLDERS:
            raise DataError(f"dataset: {folder} is a cache, expected one of {', '.join(FOLDERS)}, got {dataset}")
        return CachedImages(open_cache(folder))
    if dataset == "tiny-imagenet":
        return tiny_imagenet.read(root, split, in_memory)
    if dataset in FOLDERS:
        return read_folders(root / FOLDERS[dataset], split, optional_train=dataset == "imagefolder")
    return _read_svhn(root, split) if dataset == "svhn" else _read_cifar(root, split, dataset)


def folder_of(dataset: str, data_root: str | Path, split: str) -> tuple[Path, list[str]]:
    """The folder that holds a split's class folders, and the class names in label order: those of train, where it exists.

    Raises DataError for a missing folder.
    """
    return _folder(Path(data_root).expanduser() / FOLDERS[dataset], split, optional_train=dataset == "imagefolder")


def _folder(root: Path, split: str, optional_train: bool) -> tuple[Path, list[str]]:
    """root/train or root/val and its classes; with optional_train the classes may lie in root itself."""
    train, folder = root / "train", root / split
    if train.is_dir() or not optional_train:
        return folder, class_folders(train if split == "train" or train.is_dir() else folder)
    beside = class_folders(root)
    classes = [name for name in beside if name not in OTHER_SPLITS]
    if split == "train" and not classes:
        raise DataError(
            f"data_root: {root} holds {', '.join(beside)} and no train; put the training images into train/CLASS/ there"
        )
    return (root, classes) if split == "train" else (folder, classes or class_folders(folder))


def read_folders(root: Path, split: str, optional_train: bool) -> FolderImages:
    """Images in root/train/CLASS or root/val/CLASS; with optional_train the training classes may lie in root itself."""
    folder, classes = _folder(root, split, optional_train)
    return FolderImages(scan_class_folders(folder, classes, OTHER_SPLITS if folder == root else ()), str(folder))


def _read_cifar(root: Path, split: str, name: str) -> ArrayImages:
    folder, files, label_key = archives.CIFAR[name]
    archive = root / folder
    return _read_archive(
        root,
        split,
        name,
        archive,
        lambda: archives.read_cifar(archive, files[split], label_key),
        # torchvision's CIFAR10 and CIFAR100.
        lambda: getattr(_torchvision(), name.upper())(str(root), train=split == "train", download=True),
    )


def _read_svhn(root: Path, split: str) -> ArrayImages:
    archive = root / archives.SVHN_FILES[split]
    return _read_archive(
        root,
        split,
        "svhn",
        archive,
        lambda: archives.read_svhn(archive),
        lambda: _torchvision().SVHN(str(root), split="train" if split == "train" else "test", download=True),
    )


def _torchvision():
    # Slow to import: only where it downloads.
    from torchvision import datasets

    return datasets


def _read_archive(
    root: Path, split: str, name: str, archive: Path, read: Callable[[], ArrayImages], fetch: Callable[[], object]
) -> ArrayImages:
    """The archive if it is there, else class folders of 32x32 images, else the archive after a download."""
    if archive.exists():
        return read()
    for base in (root, root / name):
        if (base / "train").is_dir():
            files = read_folders(base, split, optional_train=False).files
            return decode_all(FolderImages(files, str(base / split), INFO[name].side))
    archives.download(fetch, root, f"{archive.name} or class folders in train/")
    return read()
