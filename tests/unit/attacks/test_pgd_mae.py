"""PGD-MAE: its geometry, its randomness, what it differentiates, and the fp16 underflow it must avoid."""

import pytest
import torch

from mimir_fast.attacks.pgd_mae import (
    MaeAttackFunctions,
    ascend_reconstruction,
    linf_bounds,
    reconstruction,
    starting_point,
)
from tests.support.golden import BOUNDS, golden_images, load_golden, small_model

EPS = 8 / 255
WHOLE_STEP = linf_bounds(EPS, EPS, 0.0, 1.0, 3, "cpu")


def test_stays_in_the_ball_and_the_range():
    images = golden_images()[1]
    adv = ascend_reconstruction(small_model(), images, BOUNDS, steps=3)
    assert (adv - images).abs().max() <= EPS + 1e-7
    assert adv.min() >= 0
    assert adv.max() <= 1
    assert not adv.requires_grad
    assert (adv != images).float().mean() > 0.5


def test_per_channel_bounds():
    images = torch.rand(4, 3, 32, 32) * 4 - 2
    eps, alpha = torch.tensor([0.1, 0.2, 0.3]).view(3, 1, 1), torch.tensor([0.05, 0.3, 0.4]).view(3, 1, 1)
    lo, hi = torch.tensor([-1.0, -1.5, -2.0]).view(3, 1, 1), torch.tensor([1.0, 1.5, 2.0]).view(3, 1, 1)
    images = torch.minimum(torch.maximum(images, lo), hi)
    adv = ascend_reconstruction(small_model(), images, linf_bounds(eps, alpha, lo, hi, 3, "cpu"), steps=2)
    assert ((adv - images).abs() <= eps + 1e-6).all()
    assert ((adv >= lo) & (adv <= hi)).all()
    reached = (adv - images).abs().amax(dim=(0, 2, 3))
    assert torch.allclose(reached, eps.flatten(), atol=1e-5)


def test_no_steps_gives_the_random_start():
    images, noise = torch.full((2, 3, 32, 32), 0.5), torch.full((2, 3, 32, 32), EPS)
    assert torch.equal(ascend_reconstruction(small_model(), images, BOUNDS, steps=0, start=noise), images + noise)
    drawn = ascend_reconstruction(small_model(), images, BOUNDS, steps=0) - images
    assert drawn.abs().max() <= EPS + 1e-7
    assert drawn.std().item() == pytest.approx(EPS / 3**0.5, rel=0.05)


def test_start_from_given_noise_stays_in_the_range():
    images = torch.rand(2, 3, 8, 8)
    start = starting_point(images, BOUNDS, torch.full_like(images, 0.6))
    assert torch.equal(start, (images + 0.6).clamp(0, 1))


def test_gradient_reaches_visible_and_masked_patches():
    """One step from the clean image: pixels move both where the encoder sees them and where only the target does."""
    images = golden_images()[2].clamp(0.2, 0.8)
    noise = load_golden("attack_unit_1step")[0]["step0_mask_noise"]
    adv = ascend_reconstruction(small_model(), images, WHOLE_STEP, start=torch.zeros_like(images), mask_noise=[noise])
    moved = ((adv - images).abs() > 0.9 * EPS).float()
    patches = moved.unfold(2, 4, 4).unfold(3, 4, 4).mean(dim=(1, 4, 5)).flatten(1)
    mask = small_model()(images, noise=noise)[2]
    assert patches[mask == 0].mean() > 0.99
    assert patches[mask == 1].mean() > 0.99


def test_raises_the_reconstruction_loss():
    model, images = small_model(), golden_images()[0]
    noise = torch.rand(8, 64)
    bounds = linf_bounds(EPS, EPS / 3, 0.0, 1.0, 3, "cpu")
    adv = ascend_reconstruction(model, images, bounds, steps=8, mask_noise=[noise] * 8)
    loss = [model(x, 0.75, noise=noise)[0].item() for x in (images, adv)]
    assert loss[1] > 1.05 * loss[0]


def test_mask_ratio_is_its_own():
    seen = []

    def spy(model, patches, *rest):
        seen.append(patches.shape[1])
        return reconstruction(model, patches, *rest)

    ascend_reconstruction(
        small_model(), golden_images()[0], BOUNDS, steps=2, mask_ratio=0.5, functions=MaeAttackFunctions(spy)
    )
    assert seen == [32, 32]


def test_leaves_the_model_as_it_was():
    model = small_model().train()
    ascend_reconstruction(model, golden_images()[0], BOUNDS, steps=2)
    assert model.training
    assert all(p.grad is None for p in model.parameters())
    assert all(p.requires_grad == ("pos_embed" not in name) for name, p in model.named_parameters())


def test_works_under_no_grad_and_is_repeatable():
    model, images = small_model(), golden_images()[0]
    with torch.no_grad():
        torch.manual_seed(3)
        first = ascend_reconstruction(model, images, BOUNDS)
    torch.manual_seed(3)
    assert torch.equal(first, ascend_reconstruction(model, images, BOUNDS))


def visible_agreement(loss_scale: float) -> float:
    """Share of visible pixels whose step has the fp32 gradient's sign, under fp16 autocast, with gradients as in large runs."""
    model, images = small_model(), golden_images()[0].clamp(0.2, 0.8)
    noise = load_golden("attack_unit_1step")[0]["step0_mask_noise"]

    def small_gradients(*args):
        loss, pred = reconstruction(*args)
        return loss / 4096, pred

    draws = {"start": torch.zeros_like(images), "mask_noise": [noise]}
    full = ascend_reconstruction(model, images, WHOLE_STEP, **draws)
    with torch.autocast("cpu", dtype=torch.float16):
        half = ascend_reconstruction(
            model, images, WHOLE_STEP, **draws, loss_scale=loss_scale, functions=MaeAttackFunctions(small_gradients)
        )
    visible = (model(images, noise=noise)[2] == 0).view(8, 1, 8, 8).repeat_interleave(4, 2).repeat_interleave(4, 3)
    agree = ((half - images).sign() == (full - images).sign()) & ((half - images).abs() > 0.5 * EPS)
    return agree[visible.expand_as(agree)].float().mean().item()


def test_fp16_needs_the_loss_scale():
    assert visible_agreement(1.0) < 0.1
    assert visible_agreement(65536.0) > 0.97


def test_wrong_arguments():
    images = golden_images()[0]
    with pytest.raises(ValueError, match="steps"):
        ascend_reconstruction(small_model(), images, BOUNDS, steps=-1)
    with pytest.raises(ValueError, match="mask_noise"):
        ascend_reconstruction(small_model(), images, BOUNDS, steps=2, mask_noise=[torch.rand(8, 64)])
