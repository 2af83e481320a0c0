"""Images in bytes: every kernel that reads them computes what it computes from their floats, bit for bit."""

import pytest
import torch

from mimir_fast.kernels import linf_bounds, linf_patch_step, linf_start, masked_patch_loss, patch_gather
from mimir_fast.kernels._shared.bytes import as_floats
from tests.support.interpreter import Sanitizer, interpret

# Each level three times.
LEVELS = torch.arange(768).remainder(256).to(torch.uint8).view(1, 3, 16, 16)
IDS, PRED = torch.tensor([[3, 0, 2]]), torch.randn(1, 3, 192)
BOUNDS = linf_bounds(8 / 255, 10 / 255, 0.0, 1.0, 3, "cpu")


def loss_and_gradient(images, impl):
    pred = PRED.clone().requires_grad_()
    loss = masked_patch_loss(pred, images, IDS, 8, True, impl=impl)
    return loss.detach(), *torch.autograd.grad(loss, pred)


def stepped(images, impl):
    adv, grad, order = linf_start(as_floats(LEVELS), BOUNDS, torch.tensor(1)), PRED[:, :1], torch.tensor([[2, 0, 3, 1]])
    return linf_patch_step(images, adv, grad, PRED, order, BOUNDS, 8, True, impl=impl)


@pytest.mark.parametrize("impl", ["triton", "reference"])
@pytest.mark.parametrize(
    "function",
    [
        lambda images, impl: linf_start(images, BOUNDS, torch.tensor(3), impl=impl),
        stepped,
        loss_and_gradient,
        lambda images, impl: patch_gather(images, IDS, 8, 0.5, impl=impl),
        lambda images, impl: patch_gather(images, IDS, 8, impl=impl),
    ],
    ids=["linf_start", "linf_patch_step", "masked_patch_loss", "patch_gather less 0.5", "patch_gather"],
)
def test_bytes_give_what_their_floats_give(function, impl):
    with interpret(Sanitizer()) as s:
        in_bytes, in_floats = function(LEVELS, impl), function(as_floats(LEVELS), impl)
    assert not s.errors
    torch.testing.assert_close(in_bytes, in_floats, rtol=0, atol=0)


def test_floats_are_torchs_division():
    assert torch.equal(as_floats(LEVELS), LEVELS.float() / 255)
    assert as_floats(PRED) is PRED
