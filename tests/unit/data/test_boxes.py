"""Boxes of crops: Philox's known answers, torchvision's distribution, and what they may depend on."""

import math

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from scipy.stats import ks_2samp
from torchvision.transforms import RandomResizedCrop

from mimir_fast.data import build_pretrain_data
from mimir_fast.data.batch_order import BatchKey
from mimir_fast.data.boxes import boxes, draw, philox
from mimir_fast.data.crops import resized_crop
from mimir_fast.data.datasets import read_images
from mimir_fast.data.randomness import Purpose
from mimir_fast.data.workers import CropMaker
from tests.support.interpreter import interpret
from tests.unit.data.test_layouts import write_classes

# Random123's kat_vectors, philox4x32 with 10 rounds: counter, key (low word first), result
KNOWN = [
    ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        [0xA4093822, 0x299F31D0],
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
]


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN)
def test_known_answers_of_random123(counter, key, words):
    made = philox(key[0] | key[1] << 32, *(np.array([word], np.uint64) for word in counter))
    assert [int(word[0]) for word in made] == words


@triton.jit
def _words(seed, counters, words, N: tl.constexpr):
    n = tl.arange(0, N)
    first, second = tl.load(counters + n), tl.load(counters + N + n)
    third, fourth = tl.load(counters + 2 * N + n), tl.load(counters + 3 * N + n)
    a, b, c, d = tl.philox(tl.load(seed), first, second, third, fourth)
    tl.store(words + n, a)
    tl.store(words + N + n, b)
    tl.store(words + 2 * N + n, c)
    tl.store(words + 3 * N + n, d)


def test_the_words_are_those_of_a_gpu():
    """tl.philox in the interpreter at the counters of the crops of 16 images: (index, attempt, epoch, purpose)."""
    seed, epoch, indices = 2**63 + 12345, 3, np.arange(16) * 99991 + 1
    drawn = draw(seed, epoch, indices)
    for attempt in (0, 9, 10):
        counter = np.stack([indices, *(np.full(16, part) for part in (attempt, epoch, Purpose.CROP))]).astype(np.int32)
        words = torch.empty(4, 16, dtype=torch.int32)
        with interpret():
            _words[(1,)](torch.tensor(seed - 2**64), torch.from_numpy(counter), words, 16)
        uniform = words.numpy().view(np.uint32).T / 2**32
        if attempt < 10:
            np.testing.assert_array_equal(drawn.numbers[:, attempt], uniform)
        else:
            np.testing.assert_array_equal(drawn.flips, uniform[:, 0] < 0.5)


def measures(found: np.ndarray) -> dict[str, np.ndarray]:
    top, left, height, width = np.asarray(found, float).T
    return {"area": height * width, "ratio": width / height, "top": top, "left": left}


@pytest.mark.slow
@pytest.mark.parametrize(("width", "height"), [(500, 375), (375, 500), (2000, 100)])
def test_distributed_as_torchvisions(width, height):
    count, image = 40_000, torch.empty(3, height, width)
    numbers = draw(0, 0, np.arange(count)).numbers
    ours = boxes(numbers, np.full(count, height), np.full(count, width))
    theirs = [RandomResizedCrop.get_params(image, [0.2, 1.0], [3 / 4, 4 / 3]) for _ in range(count)]
    for name, values in measures(ours).items():
        assert ks_2samp(values, measures(theirs)[name]).pvalue > 0.01, name
    assert (ours[:, :2] >= 0).all()
    assert (ours[:, 2:] >= 1).all()
    assert (ours[:, :2] + ours[:, 2:] <= [height, width]).all()


def test_crops_are_independent():
    """Of those of other epochs, of other seeds, and of the next image; and so are the numbers of one crop."""
    count = 40_000

    def crops(seed: int, epoch: int, first: int = 0) -> np.ndarray:
        drawn = draw(seed, epoch, np.arange(first, first + count))
        found = boxes(drawn.numbers, np.full(count, 375), np.full(count, 500))
        return np.stack([*measures(found).values(), drawn.flips])

    base = crops(0, 0)
    for other in (crops(0, 1), crops(1, 0), crops(0, 0, 1), crops(2**32, 0), crops(0, 50)):
        assert np.abs(np.corrcoef(base, other)[:5, 5:]).max() < 0.02
    assert abs(base[4].mean() - 0.5) < 0.01
    numbers = draw(0, 0, np.arange(count)).numbers.reshape(count, -1)
    assert np.abs(np.corrcoef(numbers.T) - np.eye(40)).max() < 0.02


def test_the_first_attempt_that_fits_is_taken():
    """Straightforwardly, attempt by attempt, for an image in which most do not fit."""
    numbers = draw(11, 0, np.arange(50)).numbers
    found, late = boxes(numbers, np.full(50, 200), np.full(50, 90)), 0
    for row, box in zip(numbers, found.tolist()):
        expected = None
        for attempt, (a, r, t, l) in enumerate(row.tolist()):  # noqa: E741
            area, ratio = 18_000 * (0.2 + 0.8 * a), math.exp(math.log(3 / 4) + (math.log(4 / 3) - math.log(3 / 4)) * r)
            w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if expected is None and w <= 90 and h <= 200:
                expected, late = [int(t * (201 - h)), int(l * (91 - w)), h, w], late + (attempt > 0)
        assert box == (expected or [40, 0, 120, 90])
    assert late > 10


def test_a_box_is_its_images_alone():
    """Whatever else is in the batch; sizes differ, and one is so long that no random box fits."""
    indices, heights, widths = np.arange(64), np.arange(1, 65) * 7, np.full(64, 90)
    together = boxes(draw(5, 2, indices).numbers, heights, widths)
    for n in (0, 3, 40, 63):
        alone = boxes(draw(5, 2, indices[n : n + 1]).numbers, heights[n : n + 1], widths[n : n + 1])
        np.testing.assert_array_equal(alone[0], together[n])
    assert boxes(draw(5, 2, indices[:1]).numbers, np.array([20]), np.array([400])).tolist() == [[0, 186, 20, 27]]


def test_pretraining_crops_images_at_these_boxes(tmp_path):
    """Any data set of images of any size, on any rank, at any step."""
    write_classes(tmp_path, 4, 48)
    source = read_images("imagefolder", tmp_path)
    indices = np.array([6, 1, 3])
    drawn = draw(7, 2, indices)
    found = boxes(drawn.numbers, np.full(3, 48), np.full(3, 48))
    crop = iter(found.tolist())
    whole = source.take(indices, lambda image: resized_crop(image, *next(crop), 16)).images.transpose(0, 3, 1, 2)
    expected = [image[..., ::-1] if flip else image for image, flip in zip(whole, drawn.flips)]
    made = CropMaker(source, 16, 7)[BatchKey(2, 5, indices)][0]
    np.testing.assert_array_equal(made.numpy(), np.stack(expected))
    one, two = ([*build_pretrain_data("imagefolder", tmp_path, 16, size, seed=7).epoch(1)] for size in (4, 2))
    assert torch.equal(torch.cat([images for images, _ in one]), torch.cat([images for images, _ in two]))
