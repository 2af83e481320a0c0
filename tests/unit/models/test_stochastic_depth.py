"""Stochastic depth of the classifier: given draws against the formula, values and gradients."""

import pytest
import torch
from torch import Tensor

from mimir_fast.models import VisionTransformer

SIZES = {"img_size": 16, "patch_size": 8, "num_classes": 5, "embed_dim": 24, "depth": 3, "num_heads": 2}


def by_the_formula(model: VisionTransformer, images: Tensor, noise: Tensor, rate: float) -> Tensor:
    """Each branch of an image is left out where its draw is below the block's rate, else divided by one minus the rate."""
    tokens = model.patch_embed(model.patchify(images)) + model.pos_embed[:, 1:]
    x = torch.cat([(model.cls_token + model.pos_embed[:, :1]).expand(len(tokens), -1, -1), tokens], dim=1)
    for i, block in enumerate(model.blocks):
        dropped = rate * i / (len(model.blocks) - 1)
        attention, mlp = ((draw >= dropped) / (1 - dropped) for draw in noise[i])
        x = x + attention[:, None, None] * (block.attn(block.norm1(x)) + block.attn.proj.bias)
        hidden = torch.nn.functional.gelu(block.mlp.fc1(block.norm2(x)))
        x = x + mlp[:, None, None] * block.mlp.fc2(hidden)
    return model.classify(x)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_branches_are_left_out_as_drawn(checkpointing):
    rate, images = 0.6, torch.rand(6, 3, 16, 16)
    model = VisionTransformer(**SIZES, drop_path=rate, activation_checkpointing=checkpointing)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    noise = torch.rand(3, 2, 6)
    assert 0 < (noise[1:] < 0.3).sum() < 24
    weights = torch.randn(6, 5)
    found = model(images, noise)
    expected = by_the_formula(model, images, noise, rate)
    torch.testing.assert_close(found, expected)
    assert not torch.allclose(found, model(images))
    grads = [torch.autograd.grad((out * weights).sum(), list(model.parameters())) for out in (found, expected)]
    for (name, _), ours, theirs in zip(model.named_parameters(), *grads):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4, msg=lambda text, name=name: f"{name}: {text}")


def test_without_a_rate_draws_change_nothing_and_an_image_depends_on_its_own():
    images, noise = torch.rand(3, 3, 16, 16), torch.rand(3, 2, 3)
    model = VisionTransformer(**SIZES)
    torch.testing.assert_close(model(images, noise), model(images))
    model = VisionTransformer(**SIZES, drop_path=0.5)
    order = torch.tensor([2, 0, 1])
    torch.testing.assert_close(model(images, noise)[order], model(images[order], noise[..., order]))
    assert "rates" not in model.state_dict()
