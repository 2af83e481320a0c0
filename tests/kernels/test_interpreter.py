"""The interpreter that the kernel tests stand on: it notices what a kernel must not do, and computes as a GPU does."""

import pytest
import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from tests.support.interpreter import Sanitizer, interpret


@triton.jit
def _twice(x):
    return x + x


@triton.jit
def _copy(x, y, n, SHIFT: tl.constexpr, STRIDE: tl.constexpr, BLOCK: tl.constexpr):
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + index, _twice(tl.load(x + SHIFT + index * STRIDE, mask=index < n, other=0)), mask=index < n)


@triton.jit
def _store_everywhere(x, BLOCK: tl.constexpr):
    tl.store(x + tl.arange(0, BLOCK), tl.program_id(0))


@triton.jit
def _shift_in_place(x):
    tl.store(x + tl.program_id(0), tl.load(x + tl.program_id(0) + 1))


@triton.jit
def _store_pairs(x, BLOCK: tl.constexpr):
    tl.store(x + tl.arange(0, BLOCK) // 2, tl.arange(0, BLOCK))


@triton.jit
def _far(x, n):
    tl.store(x + n * 4 * 0, 1)


@triton.jit
def _arithmetic(x, y, sums, BLOCK: tl.constexpr):
    index = tl.arange(0, BLOCK)
    a = tl.load(x + index)
    tl.store(y + index, (a * a - a) / (a + 1.5).to(a.dtype))
    tl.store(sums, tl.sum(a))


@triton.jit
def _product(a, b, c, N: tl.constexpr):
    index = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    tl.store(c + index, tl.dot(tl.load(a + index), tl.load(b + index)))


@pytest.mark.parametrize(("dtype", "stride", "used"), [(torch.float32, 1, 1.0), (torch.bfloat16, 4, 0.25)])
def test_counts_bytes_and_sectors(dtype, stride, used):
    x, y = torch.rand(1024 * stride, dtype=dtype), torch.empty(1024, dtype=dtype)
    with interpret(Sanitizer()) as s:
        _copy[(4,)](x, y, 1024, 0, stride, BLOCK=256)
    assert torch.equal(y, 2 * x[::stride])
    assert not s.errors
    assert s.st["load_bytes"] == s.st["store_bytes"] == y.nbytes
    assert s.used("load") == pytest.approx(used, rel=0.02)
    assert s.used("store") == 1.0


def test_out_of_bounds():
    x, y = torch.rand(100), torch.empty(100)
    for source, shift in ((x, 1), (x[::2], 0)):  # past the end; into the gaps of a view
        with pytest.raises(Exception, match="out of bounds"), interpret(Sanitizer()):
            _copy[(1,)](source, y, len(source), shift, 1, BLOCK=128)


def test_races_duplicates_and_overflow():
    x = torch.zeros(64, dtype=torch.int32)
    for kernel, grid, block, message in (
        (_store_everywhere, 2, {"BLOCK": 8}, "race: store by program 1, writer 0"),
        (_shift_in_place, 2, {}, "race: store by program 1, reader 0"),
        (_store_pairs, 1, {"BLOCK": 8}, "4 duplicates"),
    ):
        with interpret(Sanitizer()) as s:
            kernel[(grid,)](x, **block)
        assert message in s.errors[0]
    with pytest.raises(Exception, match="overflow"), interpret():
        _far[(1,)](x, 2**30)


def test_bf16_rounds_as_torch_does():
    x = torch.randn(4096).bfloat16()
    y, total = torch.empty_like(x), torch.empty(())
    with interpret():
        _arithmetic[(1,)](x, y, total, BLOCK=4096)
    assert torch.equal(y, (x * x - x) / (x.float() + 1.5).bfloat16())
    assert total.item() == pytest.approx(x.double().sum().item(), abs=1e-3)


@pytest.mark.parametrize(("dtype", "low", "high"), [(torch.bfloat16, 0, 2e-5), (torch.float32, 1e-4, 3e-2)])
def test_dot_rounds_its_operands_to_tf32(dtype, low, high):
    a, b = torch.randn(2, 64, 64).to(dtype)
    c = torch.empty(64, 64)
    with interpret(Sanitizer()) as s:
        _product[(1,)](a, b, c, N=64)
    assert low <= (c - a.float() @ b.float()).abs().max() <= high
    assert s.st["dot_flops"] == 2 * 64**3


def test_compilation_works_afterwards():
    with interpret():
        _copy[(1,)](torch.rand(8), torch.empty(8), 8, 0, 1, BLOCK=8)
    signature = (
        dict.fromkeys(("x", "y"), "*fp32") | {"n": "i32"} | dict.fromkeys(("SHIFT", "STRIDE", "BLOCK"), "constexpr")
    )
    source = ASTSource(_copy, signature, {"SHIFT": 0, "STRIDE": 1, "BLOCK": 128})
    assert triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["cubin"]


def test_kernels_decorated_inside_stay_compilable():
    with interpret():
        assert isinstance(triton.jit(_copy.fn), triton.JITFunction)
