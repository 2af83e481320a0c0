"""mlp: the kernels in the interpreter against float64, and what the contract promises."""

import pytest
import torch
import triton
import triton.language as tl
from torch.utils._python_dispatch import TorchDispatchMode

from mimir_fast.kernels import mlp
from mimir_fast.kernels._shared import column_sums
from mimir_fast.kernels._shared.tiles import use_tiles
from mimir_fast.kernels.mlp import kernel
from mimir_fast.kernels.mlp.gelu import gelu, gelu_slope
from mimir_fast.kernels.mlp.tiles import SIZES, alternatives
from tests.support.budget import assert_within_budget
from tests.support.interpreter import Sanitizer, interpret

NAMES = ("x", "weight1", "bias1", "weight2")
BF16 = torch.bfloat16
SHAPES = [((1,), 64, 128), ((2, 3), 128, 128), ((3, 45), 64, 256), ((130,), 192, 384)]  # leading sizes, D, F


def inputs(leading, D, F, dtype=BF16):
    tensors = torch.randn(*leading, D), torch.randn(F, D) * D**-0.5, torch.randn(F), torch.randn(D, F) * F**-0.5
    return [t.to(dtype) for t in tensors]


def output_and_gradients(tensors, impl, upstream):
    leaves = [t.detach().requires_grad_() for t in tensors]
    out = mlp(*leaves, impl=impl)
    grads = torch.autograd.grad(out, leaves, upstream.to(out.dtype))
    return {"out": out.detach()} | {f"grad {n}": g for n, g in zip(NAMES, grads)}


def check(tensors, upstream):
    """Within the budget, bitwise repeatable, no bad access."""
    truth = output_and_gradients([t.double() for t in tensors], "reference", upstream)
    eager = output_and_gradients(tensors, "reference", upstream)
    with interpret(Sanitizer()) as s:
        ours, again = (output_and_gradients(tensors, "triton", upstream) for _ in range(2))
    assert not s.errors
    for name, value in ours.items():
        assert value.dtype == eager[name].dtype, name
        assert torch.equal(value, again[name]), name
        assert_within_budget(value, eager[name], truth[name], name)


@pytest.mark.parametrize("dtype", [BF16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients(shape, dtype):
    tensors = inputs(*shape, dtype)
    check(tensors, torch.randn(tensors[0].shape).to(dtype))


@pytest.mark.parametrize("config", ["AMPERE", "HOPPER"])
def test_hidden_values_and_sums_are_close_to_float64_before_they_are_rounded_again(config, monkeypatch):
    """GELU of h as stored, its exact derivative, and sums in fp32: closer than a second rounding would allow."""
    monkeypatch.setattr(kernel, "HOPPER", getattr(kernel, config))
    x, weight1, bias1, weight2 = inputs((150,), 128, 256)
    grad = torch.randn(150, 128).to(BF16)
    with interpret(Sanitizer()) as s:
        act, pre = kernel.linear_gelu(x, weight1, bias1)
        grad_pre, sums = kernel.gelu_linear_grad(grad, weight2, pre, True)
    assert not s.errors
    hidden = torch.nn.functional.linear(x.double(), weight1.double(), bias1.double())
    half_ulp = torch.finfo(BF16).eps / 2 * (1 + 1e-3)
    assert ((pre - hidden).abs() <= half_ulp * hidden.abs() + 1e-6).all()
    stored = pre.double().requires_grad_()
    exact = torch.nn.functional.gelu(stored)
    assert ((act - exact).abs() <= half_ulp * exact.abs() + 1e-6).all()
    slope = torch.autograd.grad(exact.sum(), stored)[0]
    product = (grad.double() @ weight2.double()) * slope
    assert ((grad_pre - product).abs() <= half_ulp * product.abs() + 1e-5).all()
    assert ((sums - product.sum(0)).abs() <= half_ulp * product.sum(0).abs() + 1e-4).all()


@triton.jit
def _value_and_slope(h, value, slope, N: tl.constexpr):
    i_N = tl.arange(0, N)
    h_N = tl.load(h + i_N).to(tl.float32)
    tl.store(value + i_N, gelu(h_N))
    tl.store(slope + i_N, gelu_slope(h_N))


# What tl.math.erf's polynomials gave: errors of value and slope, and how many 16-bit numbers of each were not the nearest.
@pytest.mark.parametrize(
    ("dtype", "errors", "rounded_otherwise"),
    [(BF16, (3.8e-7, 1.15e-7), (197, 183)), (torch.float16, (4.4e-7, 1.27e-7), (331, 60))],
    ids=["bf16", "fp16"],
)
def test_gelu_of_every_number(dtype, errors, rounded_otherwise):
    h = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    ours = torch.empty(2, len(h))
    with interpret():
        _value_and_slope[(1,)](h, *ours, len(h))
    wide, finite = h.double(), h.isfinite()
    # 1 + erf, as in torch's GELU, is 0 in float64 from h = -8.3.
    phi = torch.special.erfc(-wide / 2**0.5) / 2
    truth = wide * phi, phi + wide * torch.exp(-wide * wide / 2) / (2 * torch.pi) ** 0.5
    for value, exact, error, otherwise in zip(ours, truth, errors, rounded_otherwise):
        assert (value - exact)[finite].abs().max() <= error
        assert (value.to(dtype) != exact.to(dtype))[finite].sum() <= otherwise / 3
        assert torch.equal(value[~finite].nan_to_num(), exact[~finite].float().nan_to_num())
        assert torch.equal(value[finite & (h.abs() > 15)], exact[finite & (h.abs() > 15)].float())
    assert (ours[:, h == 0] == torch.tensor([[0.0], [0.5]])).all()


@pytest.mark.parametrize("view", ["transposed", "slice", "weights"])
def test_strided_inputs(view):
    x, weight1, bias1, weight2 = inputs((4, 9), 64, 128)
    tensors = {
        "transposed": lambda: [x.mT.contiguous().mT, weight1, bias1, weight2],
        "slice": lambda: [x[:, 3:], weight1, bias1, weight2],
        "weights": lambda: [x, weight1.T.contiguous().T, bias1.repeat_interleave(2)[::2], weight2.T.contiguous().T],
    }[view]()
    check(tensors, torch.randn(tensors[0].shape).mT.contiguous().mT.to(BF16))


class Products(TorchDispatchMode):
    """Counts matrix products, ours included."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in (torch.ops.aten.mm.default, torch.ops.mimir_fast.linear_gelu.default):
            self.names.append(func._schema.name)
        if func is torch.ops.mimir_fast.gelu_linear_grad.default:
            self.names.append("with sums" if args[3] else "without sums")
        return func(*args, **(kwargs or {}))


def test_only_what_is_asked_for_is_computed():
    x, weight1, bias1, weight2 = inputs((5,), 64, 128)
    x.requires_grad_()
    with interpret(), Products() as counted:
        mlp(x, weight1, bias1, weight2, impl="triton").sum().backward()
    assert counted.names == ["mimir_fast::linear_gelu", "aten::mm", "without sums", "aten::mm"]


def test_traffic_is_the_contracts():
    M, D, F = 256, 128, 256
    x, weight1, bias1, weight2 = inputs((M,), D, F)
    across, down = triton.cdiv(F, kernel.HOPPER["BLOCK_F"]), triton.cdiv(M, kernel.HOPPER["BLOCK_M"])
    with interpret(Sanitizer()) as s:
        _, pre = kernel.linear_gelu(x, weight1, bias1)
        read, written = s.st["load_bytes"], s.st["store_bytes"]
        assert read <= 1.1 * (across * x.nbytes + down * (weight1.nbytes + bias1.nbytes))
        assert written == 2 * pre.nbytes
        _, sums = kernel.gelu_linear_grad(x, weight2, pre, True)
        partial = 4 * F * down
        expected = across * x.nbytes + down * weight2.nbytes + pre.nbytes + partial
        assert s.st["load_bytes"] - read <= 1.1 * expected
        assert s.st["store_bytes"] - written == pre.nbytes + partial + sums.nbytes
    assert s.used("load") > 0.9
    assert s.used("store") > 0.9
    assert s.st["dot_flops"] == 2 * 2 * M * D * F


@pytest.mark.slow
def test_sums_of_more_tiles_than_are_added_at_a_time():
    rows = kernel.HOPPER["BLOCK_M"] * column_sums.TILE["ROWS"] + 1
    _, _, _, weight2 = inputs((1,), 64, 128)
    grad, pre = torch.randn(rows, 64).to(BF16), torch.randn(rows, 128).to(BF16)
    with interpret(Sanitizer()) as s:
        grad_pre, sums = kernel.gelu_linear_grad(grad, weight2, pre, True)
    assert not s.errors
    expected = grad_pre.double().sum(0)
    assert ((sums - expected).abs() < 0.02 * expected.abs() + 0.5).all()


@triton.jit
def _offsets_of_first_row(out, M, F):
    _, row_M, first = kernel._tile(M, F, 128, 128, 8)
    tl.store(out + tl.arange(0, 128), row_M * F + first)


def test_row_offsets_past_the_range_of_32_bits():
    """Rows longer than 2^24: the second tile of them begins past 2^31."""
    rows, F = 130, 2**24 + 128
    offsets = torch.empty(128, dtype=torch.int64)
    with interpret(last=1):
        _offsets_of_first_row[(2 * F // 128,)](offsets, rows, F)
    assert offsets[0] == 128 * F + F - 128


def test_operator_registration_and_fullgraph_compilation():
    tensors = [t.requires_grad_() for t in inputs((5,), 64, 128)]
    detached = [t.detach() for t in tensors]
    with interpret():
        torch.library.opcheck(kernel.linear_gelu, detached[:3])
        pre = torch.randn(5, 128).to(BF16)
        for with_sums in (True, False):
            torch.library.opcheck(kernel.gelu_linear_grad, (detached[0], detached[3], pre, with_sums))
        compiled = torch.compile(lambda *t: mlp(*t, impl="triton") * 2, fullgraph=True, backend="aot_eager")
        ours, expected = compiled(*tensors), mlp(*tensors, impl="triton") * 2
        assert torch.equal(ours, expected)
        for a, b in zip(*(torch.autograd.grad(y.sum(), tensors) for y in (ours, expected)), strict=True):
            assert torch.equal(a, b)


def test_autocast_casts_everything_once():
    tensors = [t.float() for t in inputs((5,), 64, 128)]
    with interpret(), torch.autocast("cpu", BF16):
        wide = mlp(*tensors, impl="triton")
        assert torch.equal(wide, mlp(*(t.to(BF16) for t in tensors), impl="triton"))
    assert wide.dtype == BF16


def test_reference_passes_gradcheck_and_is_the_choice_in_fp32():
    double = [t.requires_grad_() for t in inputs((3,), 4, 5, torch.float64)]
    assert torch.autograd.gradcheck(mlp, double)
    with pytest.raises(ValueError, match="x: the triton implementation takes fp16 or bf16"):
        mlp(*inputs((3,), 4, 5, torch.float32), impl="triton")


def test_widths_that_are_no_whole_tiles_are_for_the_reference():
    tensors = inputs((3,), 40, 160)
    with pytest.raises(ValueError, match="weight1: triton takes D a multiple of 64 and F of 128, got D=40, F=160"):
        mlp(*tensors, impl="triton")
    assert mlp(*tensors).shape == (3, 40)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"weight1": torch.zeros(128, 9, dtype=BF16)}, "weight1"),
        ({"bias1": torch.zeros(11, dtype=BF16)}, "bias1"),
        ({"weight2": torch.zeros(128, 64, dtype=BF16)}, "weight2"),
        ({"x": torch.zeros(5, 64, dtype=torch.int64)}, "x"),
        ({"weight2": torch.zeros(64, 128), "impl": "triton"}, "weight2"),
        ({"bias1": torch.zeros(128, dtype=BF16, device="meta")}, "bias1"),
        ({"impl": "cuda"}, "impl"),
    ],
)
def test_errors_name_the_argument(change, word):
    arguments = dict(zip(NAMES, inputs((5,), 64, 128))) | change
    impl = arguments.pop("impl", "reference")
    with pytest.raises(ValueError, match=f"^{word}"):
        mlp(*arguments.values(), impl=impl)


def test_every_choice_of_tile_sizes_is_used_and_computes_the_same_function(monkeypatch):
    """Must fail for: sizes under the name of another kernel, which are not used."""
    tensors, made, Prepared = inputs((130,), 64, 256), [], kernel.Prepared
    upstream = torch.randn(130, 64).to(BF16)
    truth = output_and_gradients([t.double() for t in tensors], "reference", upstream)
    eager = output_and_gradients(tensors, "reference", upstream)
    monkeypatch.setattr(kernel, "Prepared", lambda *a, **options: made.append(options) or Prepared(*a, **options))
    for generation, named in SIZES.items():
        for name, sizes in named.items():
            tiles = alternatives(64, 256, generation)[name]
            use_tiles({(function, 64, 256, BF16): own for function, own in tiles.items()})
            with interpret(Sanitizer()) as s:
                ours = output_and_gradients(tensors, "triton", upstream)
            use_tiles({})
            assert not s.errors
            assert [sizes.items() <= options.items() for options in made] == [True, True]
            made.clear()
            for part, value in ours.items():
                assert_within_budget(value, eager[part], truth[part], f"{name} {part}")
