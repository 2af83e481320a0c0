"""Crops and flips against plain references and torchvision; uint8 to float bit by bit."""

import math

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from torchvision.transforms import InterpolationMode, Normalize, RandomResizedCrop, ToTensor
from torchvision.transforms import functional as tvf

from mimir_fast.data import build_pretrain_data, to_float
from mimir_fast.data.crops import crop_padded, flip_where, random_flip, random_pad_crop, resized_crop, sample_crop
from mimir_fast.data.datasets import read_images
from mimir_fast.data.randomness import Purpose, random_stream
from tests.unit.data.test_layouts import random_image, write_classes

ALL_BYTES = torch.arange(256, dtype=torch.uint8).reshape(1, 16, 16).repeat(3, 1, 1)
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


@pytest.mark.parametrize("device", DEVICES)
def test_to_float_is_totensor_bit_by_bit(device):
    expected = ToTensor()(ALL_BYTES.permute(1, 2, 0).numpy())
    assert torch.equal(to_float(ALL_BYTES.to(device)).cpu(), expected)


@pytest.mark.parametrize("device", DEVICES)
def test_to_float_normalises_as_torchvision(device):
    mean, std = (0.4914, 0.4822, 0.4465), (0.2471, 0.2435, 0.2616)
    expected = Normalize(mean, std)(ToTensor()(ALL_BYTES.permute(1, 2, 0).numpy()))
    batch = ALL_BYTES[None].repeat(2, 1, 1, 1).to(device)
    result = to_float(batch, mean, std).cpu()
    assert torch.equal(result[1], expected)
    assert torch.equal(batch[0].cpu(), ALL_BYTES)  # the input stays


def test_to_float_refuses_what_it_would_get_wrong():
    with pytest.raises(ValueError, match="uint8"):
        to_float(torch.zeros(1, 3, 2, 2))
    with pytest.raises(ValueError, match="mean, std"):
        to_float(ALL_BYTES, mean=(0.5, 0.5, 0.5))


@pytest.mark.parametrize("size", [1, 27, 32, 40])
def test_batch_crop_and_flip_equal_one_image_at_a_time(size):
    rng = np.random.default_rng(size)
    images = np.stack([random_image(n, 32) for n in range(9)])
    top, left = rng.integers(0, 41 - size, 9), rng.integers(0, 41 - size, 9)
    flip = rng.random(9) < 0.5
    result = flip_where(crop_padded(images, top, left, size), flip)
    for n in range(9):
        padded = ImageOps.expand(Image.fromarray(images[n]), 4, 0)
        crop = padded.crop((left[n], top[n], left[n] + size, top[n] + size))
        expected = ImageOps.mirror(crop) if flip[n] else crop
        np.testing.assert_array_equal(result[n].transpose(1, 2, 0), np.asarray(expected))


def test_pad_crop_reaches_every_corner_and_nothing_else():
    images = np.full((4000, 32, 32, 3), 255, np.uint8)
    crops = random_pad_crop(images, 32, np.random.default_rng(0))
    black_rows = (crops[:, 0, :, 16] == 0).sum(1)
    assert set(black_rows) == {0, 1, 2, 3, 4}
    from_the_left = (crops[:, 0, 16, :16] == 0).sum(1)
    counts = np.bincount(from_the_left, minlength=5)
    assert np.all(np.abs(counts[1:] - 4000 / 9) < 5 * math.sqrt(4000 / 9))  # nine offsets, equally often


def test_half_of_the_images_are_mirrored():
    images = np.zeros((2000, 3, 1, 2), np.uint8)
    images[..., 0] = 1
    mirrored = random_flip(images.copy(), True, np.random.default_rng(0))[:, 0, 0, 1].sum()
    assert abs(int(mirrored) - 1000) < 5 * math.sqrt(500)
    assert np.array_equal(random_flip(images.copy(), False, np.random.default_rng(0)), images)


def test_digits_are_never_mirrored_and_cifar_is(tmp_path):
    digits = read_images("digits", "")
    write_classes(tmp_path / "train", 8)
    cifar = read_images("cifar10", tmp_path)
    for dataset, source, mirrored_expected in (("digits", digits, False), ("cifar10", cifar, True)):
        stream = build_pretrain_data(dataset, tmp_path, 40, 16)  # 40: padded images, uncropped
        whole = [np.pad(image, ((4, 4), (4, 4), (0, 0))).tobytes() for image in source.images]
        images = next(stream.epoch(0))[0].permute(0, 2, 3, 1).numpy()
        unknown = [image for image in images if image.tobytes() not in whole]
        assert bool(unknown) == mirrored_expected
        assert all(image[:, ::-1].tobytes() in whole for image in unknown)


@pytest.mark.parametrize("box", [(0, 0, 50, 70), (3, 11, 20, 31), (10, 0, 1, 70), (49, 69, 1, 1)])
@pytest.mark.parametrize("size", [24, 96])
def test_resized_crop_equals_torchvision(box, size):
    image = Image.fromarray(random_image(1, 50, 70))
    expected = tvf.resized_crop(image, *box, [size, size], InterpolationMode.BICUBIC, antialias=True)
    np.testing.assert_array_equal(resized_crop(image, *box, size), np.asarray(expected))


@pytest.mark.parametrize("shape", [(300, 400), (64, 64), (9, 200), (200, 9), (1, 1)])
def test_crop_boxes_are_distributed_as_torchvision(shape):
    height, width = shape
    image, rng = torch.empty(3, height, width), np.random.default_rng(0)
    ours = np.array([sample_crop(height, width, rng) for _ in range(3000)])
    theirs = np.array([RandomResizedCrop.get_params(image, [0.2, 1.0], [3 / 4, 4 / 3]) for _ in range(3000)])
    assert ours.min() >= 0
    assert np.all(ours[:, 0] + ours[:, 2] <= height)
    assert np.all(ours[:, 1] + ours[:, 3] <= width)
    error = np.sqrt(theirs.var(0) / 1500) + 1e-9  # of the difference of two means
    assert np.all(np.abs(ours.mean(0) - theirs.mean(0)) < 5 * error)
    assert np.all(np.abs(ours.std(0) - theirs.std(0)) < 0.1 * theirs.std(0) + 1e-9)


def test_wide_and_tall_crops_are_equally_likely():
    boxes = np.array([sample_crop(1000, 1000, np.random.default_rng(n)) for n in range(3000)])
    log_ratios = np.log(boxes[:, 3] / boxes[:, 2])  # symmetric for a square image
    assert abs(log_ratios.mean()) < 5 * log_ratios.std() / math.sqrt(3000)


def test_streams_of_random_numbers_differ_in_every_part_of_their_position():
    positions = [(0, Purpose.AUGMENT, 1, 2), (1, Purpose.AUGMENT, 1, 2), (0, Purpose.SHUFFLE, 1, 2)]
    positions += [(0, Purpose.AUGMENT, 2, 1), (0, Purpose.AUGMENT, 1), (0, Purpose.AUGMENT, 1, 2, 0), (2**32, 1, 1, 2)]
    draws = {random_stream(*position).integers(2**62) for position in positions}
    assert len(draws) == len(positions)
    assert random_stream(-1, Purpose.SHUFFLE).random() == random_stream(-1, Purpose.SHUFFLE).random()
