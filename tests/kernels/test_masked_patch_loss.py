"""masked_patch_loss: the kernels in the interpreter against float64, and what the contract promises about traffic."""

import pytest
import torch

from mimir_fast.kernels import masked_patch_loss
from mimir_fast.kernels.masked_patch_loss import kernel
from mimir_fast.kernels.masked_patch_loss.reference import target_patches
from tests.support.budget import assert_within_budget
from tests.support.interpreter import Sanitizer, interpret

SHAPES = [  # B, C, H, W, patch size
    (2, 3, 32, 32, 16),
    (1, 3, 28, 42, 14),
    (3, 1, 8, 8, 2),
    (5, 3, 8, 12, 4),
    (1, 2, 16, 24, 8),
    (2, 3, 4, 4, 4),
]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def inputs(B, C, H, W, p, dtype=torch.float32):
    """pred is a slice, as where predictions of kept patches precede it; some patches are removed, not all where L > 1."""
    L, P = H // p * (W // p), C * p * p
    ids = torch.rand(B, L).argsort(1)[:, L // 4 :]
    pred = torch.randn(B, ids.shape[1] + 1, P).to(dtype)[:, 1:]
    return pred, torch.rand(B, C, H, W).to(dtype), ids


def loss_and_gradients(pred, images, ids, p, norm, impl):
    pred, images = pred.detach().requires_grad_(), images.detach().requires_grad_(images.is_floating_point())
    leaves = [pred, images] if images.is_floating_point() else [pred]
    loss = masked_patch_loss(pred, images, ids, p, norm, impl=impl)
    return loss.detach(), *torch.autograd.grad(-1.7 * loss, leaves)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("norm", [True, False], ids=["norm", "pix"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_value_and_gradients(shape, norm, dtype):
    pred, images, ids = inputs(*shape, dtype)
    truth = loss_and_gradients(pred.double(), images.double(), ids, shape[-1], norm, "reference")
    eager = loss_and_gradients(pred, images, ids, shape[-1], norm, "reference")
    with interpret(Sanitizer()) as s:
        ours = loss_and_gradients(pred, images, ids, shape[-1], norm, "triton")
        again = loss_and_gradients(pred, images, ids, shape[-1], norm, "triton")
    assert not s.errors
    for name, a, b, c, d in zip(("loss", "grad pred", "grad images"), ours, eager, truth, again):
        assert_within_budget(a, b, c, name)
        assert torch.equal(a, d), name
    kept = torch.ones(shape[0], shape[2] * shape[3] // shape[4] ** 2).scatter(1, ids, 0.0) == 1
    assert (target_patches(ours[2], shape[-1])[kept] == 0).all()


@pytest.mark.parametrize("storage", ["uint8", "channels_last", "strided ids", "strided pred", "mixed"])
def test_layouts_and_storage(storage):
    pred, images, ids = inputs(3, 3, 16, 24, 8)
    other = {
        "uint8": lambda: (pred, (images * 255).byte(), ids),  # divided by 255
        "channels_last": lambda: (pred, images.to(memory_format=torch.channels_last), ids),
        "strided ids": lambda: (pred, images, ids.T.contiguous().T),
        "strided pred": lambda: (pred.mT.contiguous().mT, images, ids),
        "mixed": lambda: (pred.bfloat16(), images, ids),
    }[storage]()
    truth = loss_and_gradients(*(t.double() if t.is_floating_point() else t for t in other), 8, True, "reference")
    eager = loss_and_gradients(*other, 8, True, "reference")
    with interpret(Sanitizer()) as s:
        ours = loss_and_gradients(*other, 8, True, "triton")
    assert not s.errors
    for a, b, c in zip(ours, eager, truth, strict=True):
        assert_within_budget(a, b, c)


def test_permuting_the_batch_permutes_the_gradient():
    pred, images, ids = inputs(3, 3, 8, 8, 4)
    order = torch.tensor([2, 0, 1])
    with interpret():
        loss, *grads = loss_and_gradients(pred, images, ids, 4, True, "triton")
        loss2, *grads2 = loss_and_gradients(pred[order], images[order], ids[order], 4, True, "triton")
    assert loss2.item() == pytest.approx(loss.item(), rel=1e-6)
    assert all(torch.equal(g[order], g2) for g, g2 in zip(grads, grads2))


def test_a_wide_mean_runs_over_several_blocks():
    pred, images, ids = inputs(kernel.MEAN_BLOCK // 96 + 1, 1, 32, 64, 4)
    assert ids.numel() > kernel.MEAN_BLOCK
    with interpret(Sanitizer()) as s:
        ours = masked_patch_loss(pred, images, ids, 4, True, impl="triton")
    assert not s.errors
    truth = masked_patch_loss(pred.double(), images.double(), ids, 4, True)
    assert ours.item() == pytest.approx(truth.item(), rel=1e-6)


def test_traffic_is_the_contracts():
    pred, images, ids = inputs(2, 3, 64, 64, 16)
    read = pred.numel() * 4
    pred.requires_grad_()
    with interpret(Sanitizer()) as s:
        loss = masked_patch_loss(pred, images, ids, 16, True, impl="triton")
        moved = s.st["load_bytes"] + s.st["store_bytes"]
        assert moved < 1.1 * (2 * read + ids.nbytes + 3 * 4 * ids.numel())
        assert s.used("load") > 0.9
        s.st.clear()
        loss.backward()
    assert s.st["load_bytes"] < 1.1 * (2 * read + ids.nbytes)
    assert s.st["store_bytes"] == 4 * pred.numel()
    assert s.used("load") > 0.9
    assert s.used("store") > 0.9


def test_operator_registration_and_fullgraph_compilation():
    pred, images, ids = inputs(2, 3, 8, 8, 4)

    def loss(pred, images):
        return masked_patch_loss(pred, images, ids, 4, True, impl="triton") * 2

    pred, images = pred.detach().requires_grad_(), images.requires_grad_()
    with interpret():
        torch.library.opcheck(kernel.masked_patch_loss, (pred, images, ids, 4, True))
        eager = torch.autograd.grad(loss(pred, images), (pred, images))
        compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")(pred, images)
        assert all(torch.equal(a, b) for a, b in zip(eager, torch.autograd.grad(compiled, (pred, images))))
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(loss(pred, images), compiled)


def test_reference_passes_gradcheck():
    pred, images, ids = inputs(2, 2, 4, 4, 2)
    arguments = (pred.detach().double().requires_grad_(), images.double().requires_grad_(), ids, 2, True)
    assert torch.autograd.gradcheck(lambda *a: masked_patch_loss(*a, impl="reference"), arguments)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"pred": torch.zeros(2, 3, 47)}, "pred"),
        ({"ids": torch.zeros(2, 5, dtype=torch.int64)}, "ids"),
        ({"ids": torch.zeros(2, 0, dtype=torch.int64)}, "ids"),
        ({"patch_size": 3}, "patch_size"),
        ({"impl": "cuda"}, "impl"),
        ({"pred": torch.zeros(2, 3, 48, dtype=torch.float64), "impl": "triton"}, "pred"),
    ],
)
def test_errors_name_the_argument(change, word):
    pred, images, ids = inputs(2, 3, 8, 8, 4)
    arguments = {"pred": pred, "images": images, "ids": ids, "patch_size": 4, "norm": True, "impl": "auto"} | change
    with pytest.raises(ValueError, match=f"^{word}"):
        masked_patch_loss(*arguments.values())


@pytest.mark.parametrize("impl", ["triton", "reference"])
def test_uint8_images_are_divided_by_255(impl):
    _, images, ids = inputs(2, 3, 8, 8, 4)
    stored = (images * 255).byte()
    perfect = target_patches(stored.float() / 255, 4).gather(1, ids[:, :, None].expand(-1, -1, 48))
    with interpret():
        assert masked_patch_loss(perfect, stored, ids, 4, False, impl=impl) < 1e-12
