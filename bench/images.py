"""Folders of class folders: with synthetic photographs, for where no data set is at hand, or with few images many times."""

from pathlib import Path

import numpy as np
from PIL import Image

from mimir_fast.data.datasets import read_folders

DISTINCT = 64  # different pictures; decoding costs the same however often one is repeated


def write_images(folder: Path, count: int, width: int = 500, height: int = 375) -> Path:
    """`count` JPEG files below folder/train/CLASS, smooth colours with fine noise, as large as ImageNet's; returns the folder.

    Past DISTINCT they are hard links: they take no room.
    """
    random = np.random.default_rng(0)
    paths = [folder / "train" / f"class{number % 4}" / f"{number}.jpg" for number in range(count)]
    for number, path in enumerate(paths):
        path.parent.mkdir(parents=True, exist_ok=True)
        if number >= DISTINCT:
            path.hardlink_to(paths[number % DISTINCT])
            continue
        coarse = Image.fromarray(random.integers(0, 256, (6, 8, 3), dtype=np.uint8))
        smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC), dtype=np.int16)
        noisy = smooth + random.integers(-16, 17, smooth.shape, dtype=np.int16)
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(path, quality=90)
    return folder


def repeated_images(source: Path, folder: Path, count: int) -> Path:
    """`count` links below folder/train/CLASS to the images in source's class folders, over and over; returns the folder."""
    paths = read_folders(source, "train", optional_train=True).files.paths
    for number in range(count):
        original = Path(paths[number % len(paths)]).resolve()
        link = folder / "train" / original.parent.name / f"{number}{original.suffix}"
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(original)
    return folder
