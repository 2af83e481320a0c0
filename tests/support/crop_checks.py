"""What both crop operations are held to: at most a level from float64, exact where it must be, the traffic of the contract.

A test module makes a subclass of CropChecks for its operation.
"""

from functools import cache
from typing import Any

import pytest
import torch

from mimir_fast.data import to_float
from tests.support.crops import distance, hard_cases, of_the_pixels, pack
from tests.support.interpreter import Sanitizer, interpret

LEVELS = {"dtype": torch.uint8}
IMPLEMENTATIONS = pytest.mark.parametrize("impl", ["triton", "reference"])
WRONG = [
    (0, torch.zeros(3, 3, dtype=torch.uint8), "packed"),
    (0, torch.zeros(9), "packed"),
    (1, torch.zeros(2, dtype=torch.int32), "offsets"),
    (2, torch.zeros(2, 3, dtype=torch.int64), "sizes"),
    (3, torch.zeros(1, 4), "boxes"),
    (3, torch.zeros(2, 4, dtype=torch.int64), "boxes"),
    (4, torch.zeros(2), "flips"),
    (5, 0, "size"),
    (6, torch.float16, "dtype"),
    (8, torch.zeros(2, 3, 4, 4), "out"),
    (8, torch.zeros(2, 3, 4, 5, dtype=torch.uint8), "out"),
    (8, torch.zeros(3, 2, 4, 4, dtype=torch.uint8).transpose(0, 1), "out"),
]


class CropChecks:
    """op: the operation; kernel: its operator; yuv: whether windows are in luma and chroma."""

    op: Any
    kernel: Any
    yuv: bool

    def crops(self, *arguments, impl: str, **options) -> torch.Tensor:
        if impl == "reference":
            return self.op(*arguments, **options, impl=impl)
        with interpret(Sanitizer()) as s:
            crops = self.op(*arguments, **options, impl=impl)
        assert not s.errors
        return crops

    @classmethod
    @cache
    def of_hard_cases(cls, impl: str, size: int = 20, **options) -> torch.Tensor:
        """Computed once: the interpreter takes most of the time of these tests."""
        return cls().crops(*hard_cases(cls.yuv), size, impl=impl, **options)

    @pytest.mark.parametrize("impl", ["triton", "reference", "float64"])
    @pytest.mark.parametrize("size", [20, 33])
    def test_at_most_a_level_from_float64(self, impl, size):
        packed, offsets, sizes, boxes, flips = inputs = hard_cases(self.yuv)
        if impl == "float64":
            crops = self.op(packed, offsets, sizes, boxes.double(), flips, size, **LEVELS, impl="reference")
        else:
            crops = self.of_hard_cases(impl, size, **LEVELS)
        off = distance(crops, *inputs, size, self.yuv)
        assert crops.shape == off.shape
        assert off.max() <= 1
        assert off.float().mean() < 1e-4

    @IMPLEMENTATIONS
    def test_floats_are_the_levels_divided_as_to_float_does(self, impl):
        assert torch.equal(self.of_hard_cases(impl), to_float(self.of_hard_cases(impl, **LEVELS)))

    @IMPLEMENTATIONS
    def test_mirrored_where_asked(self, impl):
        *inputs, flips = hard_cases(self.yuv)
        crops = self.of_hard_cases(impl, **LEVELS)
        mirrored = self.crops(*inputs, ~flips, 20, **LEVELS, impl=impl)
        assert torch.equal(mirrored, crops.flip(3))
        assert not torch.equal(mirrored, crops)

    @IMPLEMENTATIONS
    def test_images_do_not_know_of_each_other_and_repeats_are_the_same(self, impl):
        packed, *inputs = hard_cases(self.yuv)
        crops, order = self.of_hard_cases(impl), torch.tensor([5, 2, 8, 0, 3])
        assert torch.equal(self.crops(packed, *(t[order] for t in inputs), 20, impl=impl), crops[order])
        assert self.crops(packed, *(t[:0] for t in inputs), 20, impl=impl).shape == (0, 3, 20, 20)

    @IMPLEMENTATIONS
    def test_into_a_tensor_that_is_there(self, impl):
        inputs = hard_cases(self.yuv)
        crops = torch.full((len(inputs[1]), 3, 20, 20), torch.nan)
        assert self.crops(*inputs, 20, out=crops, impl=impl) is crops
        assert torch.equal(crops, self.of_hard_cases(impl))

    @IMPLEMENTATIONS
    def test_pixels_outside_of_the_box_are_not_used(self, impl):
        """A box that begins and ends between pixels gives the same bits whatever lies around it."""
        packed, offsets, sizes = pack([(24, 30)], self.yuv)
        boxes, flips = torch.tensor([[8, 6, 10, 12.0]]), torch.tensor([False])
        crops = self.crops(packed, offsets, sizes, boxes, flips, 20, impl=impl)
        inside = torch.zeros(24, 30, dtype=torch.bool)
        inside[8:18, 6:18] = True
        keep, of_inside = torch.ones(len(packed), dtype=torch.bool), of_the_pixels(inside, self.yuv)
        keep[offsets[0] :][: len(of_inside)] = of_inside
        other = torch.where(keep, packed, 255 - packed)
        assert torch.equal(self.crops(other, offsets, sizes, boxes, flips, 20, impl=impl), crops)
        assert not torch.equal(self.crops(other, offsets, sizes, boxes - 1, flips, 20, impl=impl), crops)

    def test_past_2_to_the_31(self):
        packed, *inputs = hard_cases(self.yuv)
        offsets, *inputs = [t[4:6] for t in inputs] + [20]
        start = 2**31 + 3
        # Of zeros only the pages that are written exist.
        far = torch.zeros(start + len(packed), dtype=torch.uint8)
        far[start:] = packed
        with interpret():
            crops = self.op(far, offsets + start, *inputs, impl="triton")
        assert torch.equal(crops, self.crops(packed, offsets, *inputs, impl="triton"))
        near, there = (self.op(p, o, *inputs, impl="reference") for p, o in ((packed, offsets), (far, offsets + start)))
        assert torch.equal(near, there)

    def test_traffic_is_the_contracts(self):
        """Sectors of memory that the launch touches, each once: whole windows and all results; on a GPU the rest is L2."""
        packed, offsets, sizes = pack([(64, 96), (96, 128)], self.yuv)
        boxes, flips = torch.tensor([[0, 0, 64, 96.0], [0, 0, 96, 128]]), torch.tensor([False, True])
        with interpret(Sanitizer()) as s:
            crops = self.op(packed, offsets, sizes, boxes, flips, 64, impl="triton")
        assert s.launches.total() == 1
        assert not s.errors
        assert s.touched_sectors() * 32 <= 1.1 * (packed.nbytes + crops.nbytes)
        assert s.st["store_bytes"] == crops.nbytes
        assert s.used("store") == 1

    def test_operator_registration_and_fullgraph_compilation(self):
        packed, *inputs = hard_cases(self.yuv)
        inputs = [packed] + [t[:3] for t in inputs]
        with interpret():
            torch.library.opcheck(self.kernel, (*inputs, torch.zeros(3, 3, 8, 8)))
            compiled = torch.compile(self.op, fullgraph=True, backend="aot_eager")
            assert torch.equal(compiled(*inputs, 8, impl="triton"), self.op(*inputs, 8, impl="triton"))

    @pytest.mark.parametrize(("place", "value", "word"), WRONG)
    def test_errors_name_the_argument(self, place, value, word):
        boxes, flips = torch.tensor([[0, 0, 2, 2.0]] * 2), torch.tensor([False, True])
        arguments = [*pack([(2, 2), (2, 4)], self.yuv), boxes, flips, 4, torch.uint8, "auto", None]
        self.op(*arguments)
        arguments[place] = value
        with pytest.raises(ValueError, match=f"^{word}"):
            self.op(*arguments)
