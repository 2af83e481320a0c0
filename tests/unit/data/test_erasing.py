"""Random erasing: boxes, colours, shares as timm has them; every data set honours it."""

import random

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data.random_erasing import RandomErasing

from mimir_fast.data import Augment, build_train_data
from mimir_fast.data.erasing import random_erasing, sample_box
from tests.unit.data.test_layouts import write_cifar10, write_classes


def erased(mode, prob=1.0, max_count=1, count=400, side=32):
    """Boolean [count,side,side]: where grey images were changed, and the images."""
    grey = Image.new("RGB", (side, side), (99, 99, 99))
    rng = np.random.default_rng(0)
    images = np.stack([np.asarray(random_erasing(grey, rng, prob, mode, max_count)) for _ in range(count)])
    assert np.asarray(grey).min() == np.asarray(grey).max() == 99
    return (images != 99).any(-1), images


def test_erased_boxes_are_those_of_timm():
    ours, _ = erased("const", count=2000)
    theirs = torch.ones(2000, 3, 32, 32)
    random.seed(0)
    RandomErasing(1.0, mode="const", device="cpu")(theirs)
    theirs = (theirs[:, 0] == 0).numpy()
    for statistic in (
        lambda e: e.mean((1, 2)),
        lambda e: e.any(1).sum(1),
        lambda e: e.any(2).sum(1),
        lambda e: e[:, 0, 0],
    ):
        a, b = statistic(ours).astype(float), statistic(theirs).astype(float)
        assert abs(a.mean() - b.mean()) < 5 * np.sqrt(a.var() / 2000 + b.var() / 2000) + 1e-9
    boxes = [sample_box(32, 32, np.random.default_rng(n), count=3) for n in range(500)]
    assert max(box[2] * box[3] for box in boxes) <= 1024 / 9 + 20  # a third of a third, up to rounding of the sides
    assert sample_box(1, 1, np.random.default_rng(0)) is None


@pytest.mark.parametrize(("prob", "expected"), [(0.0, 0.0), (0.25, 0.25), (1.0, 1.0)])
def test_share_of_erased_images(prob, expected):
    where, _ = erased("const", prob, count=1000)
    assert abs(where.any((1, 2)).mean() - expected) < 5 * np.sqrt(expected * (1 - expected) / 1000) + 1e-9


def test_colours_of_erased_boxes():
    where, images = erased("const")
    assert set(images[where].ravel()) == {0}
    where, images = erased("rand")
    colours = [np.unique(image[mask], axis=0) for image, mask in zip(images, where)]
    assert all(len(colour) == 1 for colour in colours)
    assert abs(np.concatenate(colours).mean() - 127.5) < 5 * 74 / np.sqrt(3 * 400)
    where, images = erased("pixel")
    pixels = images[where].astype(float)
    assert pixels.min() == 0
    assert pixels.max() == 255
    np.testing.assert_allclose([pixels.mean(), pixels.std()], [127.5, 73.9], rtol=0.02)  # uniform


def test_several_boxes():
    single, _ = erased("const", max_count=1)
    several, _ = erased("const", max_count=4)

    def is_box(mask):
        return mask.sum() == mask.any(0).sum() * mask.any(1).sum()

    assert all(is_box(mask) for mask in single)
    assert 0.2 < np.mean([is_box(mask) for mask in several]) < 0.4  # a quarter has one box, and some boxes touch
    assert several.mean() <= 1.05 * single.mean()  # the area is shared, not multiplied


def test_erasing_is_honoured_for_every_data_set(tmp_path):
    write_classes(tmp_path / "train", 8, 64)
    for dataset, size in (("cifar10", 32), ("imagefolder", 32), ("tiny-imagenet", 64), ("digits", 32)):
        root = tmp_path
        if dataset == "cifar10":
            root = tmp_path / "cifar"
            write_cifar10(root)
        options = {} if dataset == "digits" else {"num_classes": None if dataset in ("cifar10", "imagefolder") else 2}
        streams = [
            build_train_data(dataset, root, size, 16, augment=Augment(reprob=p, remode="const"), **options)
            for p in (0, 1)
        ]
        plain, black = (next(stream.epoch(0))[0] for stream in streams)
        different = (plain != black).any(1)
        assert (different.flatten(1).any(1)).float().mean() > 0.8  # a few boxes fall on what was black already
        assert int(black.permute(0, 2, 3, 1)[different].max()) == 0
