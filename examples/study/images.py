"""The study's images: of every class the first ones, as arrays, from which a run starts at once."""

import pickle
from functools import partial
from pathlib import Path
from typing import cast

import numpy as np

from mimir_fast.checkpoints.atomic import write_atomically
from mimir_fast.data.archives import CIFAR
from mimir_fast.data.datasets import read_images
from mimir_fast.data.sources import ArrayImages


def prepare(dataset: str, data_root: str, folder: Path, per_class: tuple[int, int]) -> None:
    """Write the chosen images of CIFAR-10 below folder, unless they are there; other data sets are read as they are.

    data_root   archive or class folders of 32x32 images; per_class: training and validation images, 0: all
    Raises DataError if data_root holds no such images.
    """
    target = folder / CIFAR["cifar10"][0]
    if dataset != "cifar10" or (target / "test_batch").exists():
        return
    # CIFAR-10 is always in memory.
    splits = [cast(ArrayImages, read_images(dataset, data_root, split)) for split in ("train", "val")]
    train, test = (select(images, count) for images, count in zip(splits, per_class))
    write(target / "batches.meta", {"label_names": train.classes})
    for number, rows in enumerate(np.array_split(np.arange(len(train)), 5), 1):
        write(target / f"data_batch_{number}", batch(train.select(rows)))
    # Last: it says that the others are complete.
    write(target / "test_batch", batch(test))


def select(images: ArrayImages, per_class: int) -> ArrayImages:
    """The first images of every class; 0: all."""
    if not per_class:
        return images
    return images.select(
        np.concatenate([np.flatnonzero(images.labels == c)[:per_class] for c in np.unique(images.labels)])
    )


def batch(images: ArrayImages) -> dict:
    """Images as in a file of CIFAR's archive: data uint8 [N,3072], channel by channel."""
    data = np.ascontiguousarray(images.images.transpose(0, 3, 1, 2)).reshape(len(images), -1)
    return {"data": data, "labels": images.labels.tolist()}


def write(path: Path, content: dict) -> None:
    write_atomically(path, partial(pickle.dump, content))
