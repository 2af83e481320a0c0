"""linf_patch_step: the kernel in the interpreter against float64, and both against the autograd gradient of the model."""

import pytest
import torch

from mimir_fast.kernels import linf_bounds, linf_patch_step, mask_indices, patch_gather
from mimir_fast.kernels.linf_patch_step import kernel, reference
from mimir_fast.kernels.masked_patch_loss.reference import target_patches
from tests.support.golden import golden_images, small_model
from tests.support.interpreter import Sanitizer, interpret

SHAPES = [  # B, C, H, W, patch size, K
    (2, 3, 32, 32, 16, 1),
    (1, 3, 28, 42, 14, 2),
    (3, 1, 8, 8, 2, 4),
    (5, 3, 8, 12, 4, 5),
    (1, 2, 16, 24, 8, 6),  # nothing removed
]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def inputs(B, C, H, W, p, K, dtype=torch.float32):
    """A step from an arbitrary point of the ball; every third number of a visible gradient is exactly zero."""
    L, P = H // p * (W // p), C * p * p
    bounds = linf_bounds(0.03 + 0.02 * torch.rand(C), 0.04, 0.0, 1 - 0.1 * torch.rand(C, 1, 1), C, "cpu")
    eps, _, lo, hi = bounds[:, :, None, None]
    images = torch.clamp(torch.rand(B, C, H, W), lo, hi)
    adv = torch.clamp(images + eps * (2 * torch.rand_like(images) - 1), lo, hi)
    grad_visible = torch.randn(B, K, P).to(dtype)
    grad_visible[..., ::3] = 0
    pred = torch.randn(B, L + 1, P).to(dtype)[:, 1 + K :]
    return images, adv, grad_visible, pred, torch.rand(B, L).argsort(1), bounds, p


def gradient(adv, grad_visible, pred, ids_restore, p, norm):
    """The reference's gradient [B,L,P] in float64, visible patches' too, in (row, column, channel) order."""
    patches, K = target_patches(adv.double(), p), grad_visible.shape[1]
    whole = torch.cat([torch.zeros_like(patches[:, :K]), pred.double()], dim=1)
    whole = whole.gather(1, ids_restore[:, :, None].expand_as(whole))
    hidden = reference.target_gradient(patches, whole, norm)
    rank = ids_restore[:, :, None].clamp(max=K - 1).expand_as(hidden)
    visible = grad_visible.double().gather(1, rank).unflatten(2, (adv.shape[1], -1)).transpose(2, 3).flatten(2)
    return torch.where(ids_restore[:, :, None] < K, visible, hidden)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("norm", [True, False], ids=["norm", "pix"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_step(shape, norm, dtype):
    arguments = inputs(*shape, dtype)
    images, adv, grad_visible, pred, ids_restore, bounds, p = arguments
    with interpret(Sanitizer()) as s:
        ours = linf_patch_step(*arguments, norm, impl="triton")
        again = linf_patch_step(*arguments, norm, impl="triton")
    assert not s.errors
    assert torch.equal(ours, again)
    truth = linf_patch_step(images.double(), adv.double(), *arguments[2:], norm)
    g = gradient(adv, grad_visible, pred, ids_restore, p, norm)
    noise = (g != 0) & (g.abs() < 1e-5)  # the sign of these is rounding
    differs = target_patches((ours - truth).abs() > 1e-6, p)
    assert not (differs & ~noise).any()
    assert noise.float().mean() < 0.01
    eps, _, lo, hi = bounds[:, :, None, None]
    assert ((ours - images).abs() <= eps + 1e-7).all()
    assert ((ours >= lo) & (ours <= hi)).all()
    assert (target_patches((adv - ours).abs(), p)[g == 0] < 1e-7).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_images_in_16_bits(dtype):
    images, adv, *rest = inputs(2, 3, 8, 12, 4, 3)
    images, adv = images.to(dtype), adv.to(dtype)
    with interpret(Sanitizer()) as s:
        ours = linf_patch_step(images, adv, *rest, False, impl="triton")
    assert not s.errors
    assert ours.dtype == dtype
    assert torch.equal(ours, linf_patch_step(images, adv, *rest, False, impl="reference"))


def test_an_exactly_zero_gradient_keeps_the_pixel():
    images, adv, grad_visible, _, ids_restore, _, p = inputs(2, 3, 8, 8, 4, 2)
    bounds = linf_bounds(0.1, 0.04, 0.0, 1.0, 3, "cpu")
    pred = target_patches(adv, p).gather(1, ids_restore.argsort(1)[:, 2:, None].expand(-1, -1, 48))
    for impl in ("triton", "reference"):
        with interpret():
            ours = linf_patch_step(images, adv, 0 * grad_visible, pred, ids_restore, bounds, p, False, impl=impl)
        assert (ours - adv).abs().max() < 1e-7


@pytest.mark.parametrize("norm", [True, False], ids=["norm", "pix"])
def test_equals_the_step_along_the_models_own_gradient(norm):
    """Visible patches through the encoder, removed ones through the target: together, all of d loss / d image."""
    model, images = small_model(norm, torch.float64), golden_images()[0].double()
    adv = (images + 0.03 * (2 * torch.rand_like(images) - 1)).clamp(0, 1).requires_grad_()
    noise = torch.rand(len(images), 64, dtype=torch.float64)
    loss, pred, _, _ = model(adv, noise=noise)
    (grad,) = torch.autograd.grad(loss, adv)
    ids_shuffle, ids_restore = mask_indices(noise)
    pred = pred.detach().gather(1, ids_shuffle[:, 16:, None].expand(-1, -1, pred.shape[2]))
    arguments = (patch_gather(grad, ids_shuffle[:, :16], 4), pred, ids_restore)
    bounds = linf_bounds(8 / 255, 10 / 255, 0.0, 1.0, 3, "cpu")
    delta = (adv.detach() + 10 / 255 * grad.sign() - images).clamp(-8 / 255, 8 / 255)
    expected = (images + delta).clamp(0, 1)
    exact = linf_patch_step(images, adv.detach(), *arguments, bounds, 4, norm, impl="reference")
    assert (exact - expected).abs().max() < 1e-8  # the bounds are fp32
    with interpret(Sanitizer()) as s:
        single = [t.float() if t.is_floating_point() else t for t in (images, adv.detach(), *arguments)]
        ours = linf_patch_step(*single, bounds, 4, norm, impl="triton")
    assert not s.errors
    differs = (ours - expected).abs() > 1e-6
    assert differs.sum() <= 4
    assert (grad.abs()[differs] < 1e-4 * grad.abs().mean()).all()


def test_traffic_is_the_contracts():
    arguments = inputs(2, 3, 64, 64, 16, 4)
    images, _, grad_visible, pred, ids_restore, _, _ = arguments
    with interpret(Sanitizer()) as s:
        linf_patch_step(*arguments, True, impl="triton")
    read = 2 * images.nbytes + grad_visible.nbytes + pred.nbytes + ids_restore.nbytes
    assert s.st["load_bytes"] < 1.1 * read
    assert s.st["store_bytes"] == images.nbytes
    assert s.used("load") > 0.9
    assert s.used("store") > 0.9


def test_non_contiguous_inputs():
    images, adv, grad_visible, pred, ids_restore, bounds, p = inputs(2, 3, 8, 12, 4, 3)
    with interpret(Sanitizer()) as s:
        plain = linf_patch_step(images, adv, grad_visible, pred, ids_restore, bounds, p, True, impl="triton")
        last = torch.channels_last
        strided = (images.to(memory_format=last), adv.to(memory_format=last), grad_visible.mT.contiguous().mT)
        pred, ids_restore = pred.mT.contiguous().mT, ids_restore.T.contiguous().T
        assert torch.equal(plain, linf_patch_step(*strided, pred, ids_restore, bounds, p, True, impl="triton"))
    assert not s.errors


def test_operator_registration_and_fullgraph_compilation():
    arguments = (*inputs(2, 3, 8, 8, 4, 2), True)
    with interpret():
        torch.library.opcheck(kernel.linf_patch_step, arguments)
        compiled = torch.compile(linf_patch_step, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(*arguments, impl="triton"), linf_patch_step(*arguments, impl="triton"))


@pytest.mark.parametrize("name", ["adv", "grad_visible", "pred", "ids_restore", "bounds"])
def test_errors_name_the_argument(name):
    arguments = dict(zip(("images", "adv", "grad_visible", "pred", "ids_restore", "bounds"), inputs(2, 3, 8, 8, 4, 2)))
    arguments[name] = arguments[name][..., :1]
    with pytest.raises(ValueError, match=f"^{name}"):
        linf_patch_step(*arguments.values(), 4, True)
    with pytest.raises(ValueError, match=r"^eps: expected 1 or 3"):
        linf_bounds(torch.ones(2), 0.0, 0.0, 1.0, 3, "cpu")
