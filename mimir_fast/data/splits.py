"""Splits: images held out from training, subsets, and the names of the classes."""

import numpy as np

from mimir_fast.data.datasets import Source, dataset_info
from mimir_fast.data.errors import DataError
from mimir_fast.data.randomness import Purpose, random_stream
from mimir_fast.data.sources import ArrayImages


def held_out_indices(num_images: int, held_out: int) -> tuple[np.ndarray, np.ndarray]:
    """Indices, ascending, of the training images that stay and of those held out: the last of one fixed permutation.

    Every run with the same data holds out the same images, whatever its seed.  Raises DataError if none would stay.
    """
    # Seed 0 and not the run's: pre-training, fine-tuning and evaluation must agree on what is held out.
    if not 0 <= held_out < num_images:
        raise DataError(f"held_out: {held_out} of {num_images} training images, expected 0 to {num_images - 1}")
    order = random_stream(0, Purpose.HELD_OUT, num_images).permutation(num_images)
    return np.sort(order[: num_images - held_out]), np.sort(order[num_images - held_out :])


def subset_indices(num_images: int, count: int, seed: int | None = None) -> list[int]:
    """Indices, ascending, of `count` of num_images images: the first, or with a seed a random choice without replacement.

    Raises DataError unless 1 <= count <= num_images.
    """
    if not 1 <= count <= num_images:
        raise DataError(f"num_images: {count}, expected 1 to {num_images}, the images there are")
    if seed is None:
        return list(range(count))
    return np.sort(random_stream(seed, Purpose.SUBSET).permutation(num_images)[:count]).tolist()


def class_names(dataset: str, source: Source, num_classes: int | None) -> list[str]:
    """Names of the classes in label order, as many as num_classes, or as the data set has if that is None.

    Raises DataError if the folders, the data set and num_classes disagree, or a label is outside of them.
    """
    known = dataset_info(dataset).num_classes
    # Arrays without names are those of a data set whose number of classes is known.
    found = (known or 0) if source.classes is None else len(source.classes)
    expected = num_classes or known or found
    where = dataset if isinstance(source, ArrayImages) else f"class folders of {source.bad.where}"
    if found != expected:
        what = f"nb_classes: {expected}" if num_classes else f"nb_classes: {dataset} has {expected} classes"
        raise DataError(f"{what}, but found {found} ({where}): give the number there is, or the data that fits")
    check_labels(source.labels, expected, where)
    return source.classes or [str(label) for label in range(expected)]


def check_same_classes(known: list[str] | None, found: list[str], whose: str) -> None:
    """Raise DataError, showing the first difference, if classes have other names, in the order of their labels.

    known   None: not known; whose: where these names are from, for the message
    Names that are the labels' numbers say nothing: they stand for those of data sets without names.
    """
    if known is None or known == found or any(names == [str(i) for i in range(len(names))] for names in (known, found)):
        return
    label = next(
        (i for i, (ours, theirs) in enumerate(zip(known, found)) if ours != theirs), min(len(known), len(found))
    )
    was, now = (names[label] if label < len(names) else "no class" for names in (known, found))
    raise DataError(
        f"classes: label {label} is {was!r} in {whose} and {now!r} in the images; give images of the same classes, in folders "
        "of the same names"
    )


def check_labels(labels: np.ndarray, num_classes: int, where: str) -> None:
    """Raise DataError unless labels [N] are in [0, num_classes)."""
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= num_classes:
        raise DataError(
            f"nb_classes: {num_classes} classes, labels 0 to {num_classes - 1}, but those of {where} are {low} to {high}"
        )
