"""The attention seam: every backend that is installed computes the same, others are refused by name."""

import pytest
import torch

from mimir_fast.config.choices import ATTENTION, SDPA_BACKENDS
from mimir_fast.models import create_model
from mimir_fast.models.attention import PACKAGES, attention, check_backend
from mimir_fast.models.layers import Attention
from tests.support.budget import assert_within_budget
from tests.support.golden import small_model
from tests.support.interpreter import Sanitizer, interpret

HERE = [name for name in ATTENTION if name not in (*PACKAGES, *SDPA_BACKENDS, "short", "narrow")]


@pytest.mark.parametrize("query_start", [0, 3, 6])
@pytest.mark.parametrize("backend", HERE)
def test_backends_compute_attention(backend, query_start):
    B, T, N, d = 2, 7, 3, 4
    qkv = torch.randn(B, T, 3 * N * d, dtype=torch.float64, requires_grad=True)
    out = attention(qkv, N, query_start, backend)
    assert out.shape == (B, T - query_start, N * d)
    q, k, v = qkv.reshape(B, T, 3, N, d).permute(2, 0, 3, 1, 4)
    scores = torch.einsum("bnqd,bnkd->bnqk", q, k) / d**0.5
    expected = torch.einsum("bnqk,bnkd->bqnd", scores.exp() / scores.exp().sum(-1, keepdim=True), v)
    assert torch.allclose(out, expected.flatten(2)[:, query_start:], atol=1e-12)
    upstream = torch.randn_like(out)
    ours, truth = (
        torch.autograd.grad(y, qkv, upstream, retain_graph=True)[0] for y in (out, expected.flatten(2)[:, query_start:])
    )
    assert torch.allclose(ours, truth, atol=1e-12)


@pytest.mark.parametrize("backend", HERE)
def test_the_model_uses_the_backend_it_was_given(backend):
    model = small_model()
    images, noise = torch.rand(2, 3, 32, 32), torch.rand(2, 64)
    expected = model(images, noise=noise)[0]
    other = type(model)(
        img_size=32, patch_size=4, embed_dim=48, depth=2, num_heads=3, decoder_embed_dim=32, decoder_depth=1,
        decoder_num_heads=4, norm_pix_loss=True, attention=backend,
    )  # fmt: skip
    other.load_state_dict(model.state_dict())
    assert all(block.attn.backend == backend for block in [*other.blocks, *other.decoder_blocks])
    assert abs(other(images, noise=noise)[0] - expected) < 1e-6


def test_absent_packages_and_unknown_names_are_refused(monkeypatch):
    monkeypatch.setattr("mimir_fast.models.attention.find_spec", lambda name: None)
    for name, package in PACKAGES.items():
        with pytest.raises(ValueError, match=f"attention: {name} needs the package {package}"):
            create_model("mae_vit_ti", img_size=32, patch_size=4, attention=name)
    with pytest.raises(ValueError, match="attention: expected one of auto, short"):
        check_backend("fast")


def test_short_attention_in_the_seam():
    """In the interpreter: the kernel where it offers the size, sdpa where not, the same output and gradient."""
    qkv = torch.randn(2, 7, 3 * 2 * 8, requires_grad=True)
    long = torch.randn(1, 300, 3 * 2 * 8)
    block, x = Attention(16, 2, "short").bfloat16(), torch.randn(2, 7, 16).bfloat16()
    with interpret(Sanitizer()) as s:
        out = attention(qkv, 2, 3, "short")
        upstream = torch.randn_like(out)
        (grad,) = torch.autograd.grad(out, qkv, upstream)
        assert s.launches == {"_attend_kernel": 1, "_attend_grad_kernel": 1}
        assert torch.equal(attention(long, 2, 0, "short"), attention(long, 2, 0, "sdpa"))
        ours = torch.autograd.grad(block(x, 3).square().sum(), [*block.qkv.parameters()])
        assert s.launches["_add_partials_kernel"] == 1
    assert not s.errors
    block.backend = "sdpa"
    for mine, truth in zip(ours, torch.autograd.grad(block(x, 3).square().sum(), [*block.qkv.parameters()])):
        assert (mine - truth).norm() < 0.02 * truth.norm()
    expected = attention(qkv, 2, 3, "sdpa")
    assert torch.allclose(out, expected, atol=1e-5)
    assert torch.allclose(grad, torch.autograd.grad(expected, qkv, upstream)[0], atol=1e-5)


@pytest.mark.slow
def test_narrow_attention_in_the_seam():
    tokens, head, query_start = 21, 5, 4  # heads of 8: tests/golden/test_pretraining.py
    B, N = 2, 3
    qkv = torch.randn(tokens, B, 3 * N * head).transpose(0, 1) * 3  # not contiguous, some weights as small as 2^-126
    qkv[0, -1] *= 4
    upstream = torch.randn(B, tokens - query_start, N * head)

    def both(backend: str, dtype: torch.dtype) -> dict:
        x = qkv.to(dtype).requires_grad_()
        out = attention(x, N, query_start, backend)
        return {"out": out, "grad": torch.autograd.grad(out, x, upstream.to(dtype))[0]}

    ours, eager, truth = both("narrow", torch.float32), both("math", torch.float32), both("math", torch.float64)
    for name in ours:
        assert_within_budget(ours[name], eager[name], truth[name], name)
    assert not ours["grad"][:, :query_start, : N * head].any()
    arguments = qkv.contiguous().requires_grad_(), N, query_start
    torch.library.opcheck(torch.ops.mimir_fast.narrow_attention.default, arguments)


def test_narrow_attention_leaves_other_sizes_and_types_to_torch():
    wide, double = torch.randn(1, 9, 3 * 2 * 32), torch.randn(1, 9, 3 * 2 * 8, dtype=torch.float64)
    long = torch.randn(1, 130, 3 * 2 * 32)
    for qkv, backend in ((wide, "math"), (double, "math"), (long, "sdpa")):
        assert torch.equal(attention(qkv, 2, 3, "narrow"), attention(qkv, 2, 3, backend))
