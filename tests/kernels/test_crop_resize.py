"""crop_resize: at most a level from float64, exact where it must be, and the traffic of its contract."""

import pytest
import torch

from mimir_fast.data import to_float
from mimir_fast.kernels import crop_resize
from mimir_fast.kernels.crop_resize import kernel
from tests.support.crops import distance, hard_cases, pack
from tests.support.interpreter import Sanitizer, interpret

YUV = False
LEVELS = {"dtype": torch.uint8}


def ours(*arguments, **options) -> torch.Tensor:
    with interpret(Sanitizer()) as s:
        crops = crop_resize(*arguments, **options, impl="triton")
    assert not s.errors
    return crops


def reference(*arguments, **options) -> torch.Tensor:
    return crop_resize(*arguments, **options, impl="reference")


def in_float64(packed, offsets, sizes, boxes, *rest, **options) -> torch.Tensor:
    return reference(packed, offsets, sizes, boxes.double(), *rest, **options)


IMPLEMENTATIONS = pytest.mark.parametrize("function", [ours, reference], ids=["triton", "reference"])


@pytest.mark.parametrize("function", [ours, reference, in_float64], ids=["triton", "reference", "float64"])
@pytest.mark.parametrize("size", [20, 33])
def test_at_most_a_level_from_float64(function, size):
    inputs = hard_cases(YUV)
    crops = function(*inputs, size, **LEVELS)
    off = distance(crops, *inputs, size, YUV)
    assert crops.shape == off.shape
    assert off.max() <= 1
    assert off.float().mean() < 1e-4


@IMPLEMENTATIONS
def test_floats_are_the_levels_divided_as_to_float_does(function):
    inputs = hard_cases(YUV)
    assert torch.equal(function(*inputs, 20), to_float(function(*inputs, 20, **LEVELS)))


@IMPLEMENTATIONS
def test_mirrored_where_asked(function):
    *inputs, _ = hard_cases(YUV)
    B = len(inputs[1])
    plain, mirrored = (function(*inputs, torch.full((B,), flip), 11, **LEVELS) for flip in (False, True))
    assert torch.equal(mirrored, plain.flip(3))
    assert not torch.equal(mirrored, plain)


@IMPLEMENTATIONS
def test_images_do_not_know_of_each_other_and_repeats_are_the_same(function):
    packed, *inputs = hard_cases(YUV)
    crops, order = function(packed, *inputs, 20), torch.tensor([5, 2, 8, 0, 3])
    assert torch.equal(function(packed, *(t[order] for t in inputs), 20), crops[order])
    assert function(packed, *(t[:0] for t in inputs), 20).shape == (0, 3, 20, 20)


@IMPLEMENTATIONS
def test_pixels_outside_of_the_box_are_not_used(function):
    """A box that begins and ends between pixels gives the same bits whatever lies around it."""
    packed, offsets, sizes = pack([(24, 30)], YUV)
    boxes, flips = torch.tensor([[8, 6, 10, 12.0]]), torch.tensor([False])
    crops = function(packed, offsets, sizes, boxes, flips, 20)
    inside = torch.zeros(24, 30, dtype=torch.bool)
    inside[8:18, 6:18] = True
    keep = torch.ones(len(packed), dtype=torch.bool)
    keep[offsets[0] :][: 24 * 30 * 3] = inside.repeat_interleave(3)
    other = torch.where(keep, packed, 255 - packed)
    assert torch.equal(function(other, offsets, sizes, boxes, flips, 20), crops)
    assert not torch.equal(function(other, offsets, sizes, boxes - 1, flips, 20), crops)


def test_past_2_to_the_31():
    packed, *inputs = hard_cases(YUV)
    offsets, *inputs = [t[4:6] for t in inputs] + [20]
    start = 2**31 + 3
    # Of zeros only the pages that are written exist.
    far = torch.zeros(start + len(packed), dtype=torch.uint8)
    far[start:] = packed
    with interpret():
        crops = crop_resize(far, offsets + start, *inputs, impl="triton")
    assert torch.equal(crops, ours(packed, offsets, *inputs))
    assert torch.equal(reference(far, offsets + start, *inputs), reference(packed, offsets, *inputs))


def test_traffic_is_the_contracts():
    """Sectors of memory that the launch touches, each once: whole windows and all results; on a GPU the rest is L2."""
    packed, offsets, sizes = pack([(64, 96), (96, 128)], YUV)
    boxes, flips = torch.tensor([[0, 0, 64, 96.0], [0, 0, 96, 128]]), torch.tensor([False, True])
    with interpret(Sanitizer()) as s:
        crops = crop_resize(packed, offsets, sizes, boxes, flips, 64, impl="triton")
    assert s.launches.total() == 1
    assert not s.errors
    assert s.touched_sectors() * 32 <= 1.1 * (packed.nbytes + crops.nbytes)
    assert s.st["store_bytes"] == crops.nbytes
    assert s.used("store") == 1


def test_operator_registration_and_fullgraph_compilation():
    packed, *inputs = hard_cases(YUV)
    inputs = [packed] + [t[:3] for t in inputs]
    with interpret():
        torch.library.opcheck(kernel.crop_resize, (*inputs, 8, True))
        compiled = torch.compile(crop_resize, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(*inputs, 8, impl="triton"), crop_resize(*inputs, 8, impl="triton"))


@pytest.mark.parametrize(
    ("place", "value", "word"),
    [
        (0, torch.zeros(3, 3, dtype=torch.uint8), "packed"),
        (0, torch.zeros(9), "packed"),
        (1, torch.zeros(2, dtype=torch.int32), "offsets"),
        (2, torch.zeros(2, 3, dtype=torch.int64), "sizes"),
        (3, torch.zeros(1, 4), "boxes"),
        (3, torch.zeros(2, 4, dtype=torch.int64), "boxes"),
        (4, torch.zeros(2), "flips"),
        (5, 0, "size"),
        (6, torch.float16, "dtype"),
    ],
)
def test_errors_name_the_argument(place, value, word):
    packed, offsets, sizes = pack([(2, 2), (2, 4)], YUV)
    arguments = [
        packed,
        offsets,
        sizes,
        torch.tensor([[0, 0, 2, 2.0]] * 2),
        torch.tensor([False, True]),
        4,
        torch.uint8,
    ]
    crop_resize(*arguments)
    arguments[place] = value
    with pytest.raises(ValueError, match=f"^{word}"):
        crop_resize(*arguments)
