"""short_attention: the kernels in the interpreter against float64, and what the contract promises about traffic."""

import math

import numpy as np
import pytest
import torch

from mimir_fast.kernels import short_attention
from mimir_fast.kernels.short_attention import kernel
from mimir_fast.kernels.short_attention.op import supported
from tests.support.budget import assert_within_budget
from tests.support.interpreter import Builder, Sanitizer, interpret, stock

SHAPES = [  # B, T, N, d: heads whole and several to a program, one and several parts of keys, one and several blocks of rows
    (2, 50, 1, 64),
    (1, 197, 2, 8),
    (1, 65, 1, 64),
    (2, 17, 3, 8),
    (1, 5, 3, 48),
    (1, 50, 1, 96),
    (3, 1, 2, 4),
    (1, 64, 5, 3),
    (1, 66, 1, 20),
    (1, 128, 1, 40),
    (1, 289, 1, 16),
]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def inputs(B, T, N, d, dtype=torch.float32):
    """qkv and the output's gradient."""
    return torch.randn(B, T, 3 * N * d).to(dtype), torch.randn(B, T, N * d).to(dtype)


def output_and_gradient(qkv, upstream, num_heads, impl):
    qkv = qkv.detach().requires_grad_()
    out = short_attention(qkv, num_heads, impl=impl)
    return out.detach(), *torch.autograd.grad(out, qkv, upstream)


def with_bias(qkv, upstream, num_heads, query_start, impl):
    """Of the last tokens' queries: output, gradient in qkv, and in the bias."""
    qkv, bias = qkv.detach().requires_grad_(), torch.randn(qkv.shape[2:], dtype=qkv.dtype, requires_grad=True)
    out = short_attention(qkv, num_heads, impl, query_start, bias)
    return out.detach(), *torch.autograd.grad(out, (qkv, bias), upstream[:, query_start:])


def explicit(qkv, num_heads):
    """The formula, word for word."""
    q, k, v = (part.unflatten(-1, (num_heads, -1)).transpose(1, 2) for part in qkv.chunk(3, dim=-1))
    return (torch.softmax(q @ k.mT / math.sqrt(q.shape[-1]), dim=-1) @ v).transpose(1, 2).flatten(2)


def check(qkv, upstream, num_heads):
    truth = output_and_gradient(qkv.double(), upstream.double(), num_heads, "reference")
    eager = output_and_gradient(qkv, upstream, num_heads, "reference")
    with interpret(Sanitizer()) as s:
        ours = output_and_gradient(qkv, upstream, num_heads, "triton")
        again = output_and_gradient(qkv, upstream, num_heads, "triton")
    assert not s.errors
    D = upstream.shape[-1]
    parts = [[t[0], *t[1].split(D, dim=-1)] for t in (ours, eager, truth, again)]
    for name, a, b, c, d in zip(("out", "grad q", "grad k", "grad v"), *parts):
        assert a.dtype == b.dtype, name
        assert_within_budget(a, b, c, name)
        assert torch.equal(a, d), name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_output_and_gradients(shape, dtype):
    if not supported(shape[1], shape[3], dtype):
        with pytest.raises(ValueError, match=r"^qkv: triton takes T <= "):
            check(*inputs(*shape, dtype), shape[2])
        return
    check(*inputs(*shape, dtype), shape[2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("shape", "query_start"),
    [((3, 18, 2, 8), 5), ((2, 50, 1, 64), 0), ((2, 66, 3, 8), 17), ((1, 81, 5, 3), 80), ((2, 100, 1, 40), 0)],
    ids=str,
)
def test_last_queries_and_the_gradient_of_a_bias(shape, query_start, dtype):
    if not supported(shape[1], shape[3], dtype):
        pytest.skip("not offered")
    qkv, upstream = inputs(*shape, dtype)
    truth = with_bias(qkv.double(), upstream.double(), shape[2], query_start, "reference")
    eager = with_bias(qkv, upstream, shape[2], query_start, "reference")
    with interpret(Sanitizer()) as s:
        ours, again = (with_bias(qkv, upstream, shape[2], query_start, "triton") for _ in range(2))
    assert not s.errors
    assert all(torch.equal(a, b) for a, b in zip(ours, again))
    D = upstream.shape[-1]
    assert not ours[1][:, :query_start, :D].any()
    for name, a, b, c in zip(("out", "grad qkv"), ours, eager, truth):
        assert_within_budget(a, b, c, name)
    # The key's bias moves all scores of a query alike: its gradient is zero but for rounding, which no budget bounds.
    for name, part in {"q": slice(D), "v": slice(2 * D, None)}.items():
        assert_within_budget(ours[2][part], eager[2][part], truth[2][part], f"grad of {name}'s bias")
    noise = ours[1][..., D : 2 * D].abs().double().sum((0, 1)) * torch.finfo(dtype).eps
    assert (ours[2][D : 2 * D].double() - ours[1][..., D : 2 * D].double().sum((0, 1))).abs().le(noise + 1e-6).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_large_scores_of_either_sign(dtype):
    """Up to hundreds: exp without the row's maximum subtracted would overflow, or underflow where all scores are negative."""
    qkv, upstream = inputs(1, 66, 2, 8, dtype)
    qkv[..., :16] *= 20
    qkv[:, :10, :16], qkv[..., 16:32] = -60, qkv[..., 16:32].abs() + 1
    check(qkv, upstream, 2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_sums_are_rounded_once(dtype):
    """Equal scores and 256 tokens: weights of 1/256, and sums of multiples of 1/64 that fp32 holds exactly."""
    qkv, upstream = torch.randint(64, 128, (1, 256, 48)) / 64, torch.randint(64, 128, (1, 256, 16)) / 64
    qkv[..., :16] = 0
    with interpret(Sanitizer()):
        out, grad = output_and_gradient(qkv.to(dtype), upstream.to(dtype), 1, "triton")
    assert torch.equal(out, qkv[..., 32:].mean(1, keepdim=True).to(dtype).expand_as(out))
    assert torch.equal(grad[..., 32:], upstream.mean(1, keepdim=True).to(dtype).expand_as(out))


@pytest.mark.parametrize("view", ["sliced", "transposed", "expanded", "expanded gradient"])
def test_strided_inputs(view):
    qkv, upstream = inputs(2, 18, 2, 8)
    qkv, upstream = {
        "sliced": lambda: (torch.randn(2, 20, 64)[:, 1:19, 8:56], upstream),
        "transposed": lambda: (qkv.mT.contiguous().mT, upstream.transpose(0, 1).contiguous().transpose(0, 1)),
        "expanded": lambda: (qkv[:1].expand(2, -1, -1), upstream),
        "expanded gradient": lambda: (qkv, torch.randn(()).expand(2, 18, 16)),
    }[view]()
    check(qkv, upstream, 2)


def test_image_offsets_past_the_range_of_32_bits(monkeypatch):
    """The last image's program alone, on tensors of which nothing else is ever touched."""
    images, (qkv, upstream) = 2**31 // 240 + 2, inputs(1, 5, 1, 16, torch.float16)
    torch.utils.deterministic.fill_uninitialized_memory = False  # 11 GiB of addresses
    try:
        many = [torch.empty(images, 5, width, dtype=torch.float16) for width in (48, 16, 16, 48)]
    finally:
        torch.utils.deterministic.fill_uninitialized_memory = True
    many[0][-1], many[2][-1] = qkv[0], upstream[0]
    last = stock.TensorHandle(np.array([images - 1], np.int32), stock.tl.int32)
    monkeypatch.setattr(Builder, "create_get_program_id", lambda self, axis: last)
    with interpret():
        sizes = {"T": 5, "FIRST": 0, "HEAD": 16, "ROWS": 16, "KEYS": 16}
        kernel._attend_kernel[(1,)](*many[:2], None, 1, **sizes)
        kernel._attend_grad_kernel[(1,)](many[2], many[0], many[3], None, 1, 0.25, **sizes)
    out, grad = output_and_gradient(qkv.float(), upstream.float(), 1, "reference")
    torch.testing.assert_close(many[1][-1].float(), out[0], atol=2e-3, rtol=2e-3)
    torch.testing.assert_close(many[3][-1].float(), grad[0], atol=4e-3, rtol=4e-3)


def test_permuting_images_and_tokens_permutes_output_and_gradient():
    qkv, upstream = inputs(3, 20, 2, 8)
    images, tokens = torch.tensor([2, 0, 1]), torch.randperm(20)
    with interpret():
        ours = output_and_gradient(qkv, upstream, 2, "triton")
        others = output_and_gradient(qkv[images], upstream[images], 2, "triton")
        moved = output_and_gradient(qkv[:, tokens], upstream[:, tokens], 2, "triton")
    assert all(torch.equal(a[images], b) for a, b in zip(ours, others))
    for a, b in zip(ours, moved):
        torch.testing.assert_close(a[:, tokens], b)


def test_the_reference_is_the_formula():
    qkv = torch.randn(2, 7, 3 * 4 * 5, dtype=torch.float64)
    torch.testing.assert_close(short_attention(qkv, 4), explicit(qkv, 4))
    assert torch.autograd.gradcheck(lambda t: short_attention(t, 2), qkv[:1, :3, :12].clone().requires_grad_())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(1, 50, 2, 64), (1, 64, 4, 8), (1, 128, 4, 8), (1, 17, 3, 48)], ids=str)
def test_traffic_is_the_contracts(shape, dtype):
    qkv, upstream = inputs(*shape, dtype)
    qkv.requires_grad_()
    with interpret(Sanitizer()) as s:
        out = short_attention(qkv, shape[2], impl="triton")
        forward = dict(s.st)
        assert s.used("load") > 0.9
        assert s.used("store") > 0.9
        s.st.clear()
        out.backward(upstream)
    sums = 4 * shape[0] * shape[1] * shape[2] if shape[1] > 64 else 0
    assert (forward["load_bytes"], forward["store_bytes"]) == (qkv.nbytes, out.nbytes + sums)
    kept = sums and out.nbytes + sums
    assert (s.st["load_bytes"], s.st["store_bytes"]) == (qkv.nbytes + out.nbytes + kept, qkv.nbytes)
    assert s.used("load") > 0.9
    assert s.used("store") > 0.9


def test_of_few_tokens_only_qkv_is_kept_for_the_backward():
    kept = []
    for tokens in (5, 65):
        qkv = torch.randn(1, tokens, 48, requires_grad=True)
        with interpret(), torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.nbytes) or t, lambda t: t):
            short_attention(qkv, 2, impl="triton")
    # Of more also the output, and a number per token and head.
    assert kept == [4 * 5 * 48, 4 * 65 * 48, 4 * 65 * 16, 4 * 65 * 2]


def test_operator_registration_and_fullgraph_compilation():
    qkv, upstream = inputs(2, 5, 2, 8)
    qkv.requires_grad_()

    def attended(qkv):
        return short_attention(qkv, 2, impl="triton").square()

    with interpret():
        torch.library.opcheck(kernel.short_attention, (qkv, torch.zeros(48, requires_grad=True), 2, 1))
        for dtype in (torch.float32, None):
            torch.library.opcheck(kernel.short_attention_grad, (upstream, qkv.detach(), None, None, 2, 0, dtype))
        eager = attended(qkv)
        compiled = torch.compile(attended, fullgraph=True, backend="aot_eager")(qkv)
        assert torch.equal(eager, compiled)
        assert torch.equal(*(torch.autograd.grad(y.sum(), qkv)[0] for y in (eager, compiled)))
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(attended(qkv), eager)


def test_the_reference_compiles_fullgraph_and_ignores_autocast():
    qkv = torch.randn(2, 5, 48)
    compiled = torch.compile(short_attention, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(qkv, 2), short_attention(qkv, 2))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(short_attention(qkv, 2), compiled(qkv, 2))


def test_what_is_supported():
    for tokens, head in [(50, 64), (197, 8), (197, 64), (257, 8), (17, 64), (50, 48), (50, 96), (512, 16)]:
        assert supported(tokens, head)
    for tokens, head, dtype in [(209, 64, torch.bfloat16), (513, 8, torch.bfloat16), (197, 8, torch.float32)]:
        assert not supported(tokens, head, dtype)
    assert not supported(0, 8)
    assert not supported(1, 129)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"qkv_BTQ": torch.randn(2, 48)}, "qkv"),
        ({"qkv_BTQ": torch.randn(2, 0, 48)}, "qkv"),
        ({"qkv_BTQ": torch.randn(2, 5, 49)}, "qkv"),
        ({"qkv_BTQ": torch.zeros(2, 5, 48, dtype=torch.int32)}, "qkv"),
        ({"qkv_BTQ": torch.randn(2, 5, 48).double(), "impl": "triton"}, "qkv"),
        ({"qkv_BTQ": torch.randn(1, 209, 96).bfloat16(), "num_heads": 1, "impl": "triton"}, "qkv"),
        ({"query_start": 5}, "query_start"),
        ({"bias_Q": torch.zeros(47)}, "bias"),
        ({"num_heads": 3}, "num_heads"),
        ({"num_heads": 0}, "num_heads"),
        ({"impl": "cuda"}, "impl"),
    ],
)
def test_errors_name_the_argument(change, word):
    with pytest.raises(ValueError, match=f"^{word}"):
        short_attention(**({"qkv_BTQ": torch.randn(2, 5, 48), "num_heads": 2} | change))
