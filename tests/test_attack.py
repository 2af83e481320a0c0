"""PGD-MAE: its geometry, its randomness, what it differentiates, and the fp16 underflow it must avoid."""

import pytest
import torch
from conftest import golden_images, load_golden, small_model

from mimir_fast.attack import linf_step, pgd_mae, reconstruction_loss

EPS, ALPHA = 8 / 255, 10 / 255


def test_stays_in_the_ball_and_the_range():
    images = golden_images()[1]
    adv = pgd_mae(small_model(), images, EPS, ALPHA, steps=3)
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
    adv = pgd_mae(small_model(), images, eps, alpha, steps=2, lo=lo, hi=hi)
    assert ((adv - images).abs() <= eps + 1e-6).all()
    assert ((adv >= lo) & (adv <= hi)).all()
    reached = (adv - images).abs().amax(dim=(0, 2, 3))
    assert torch.allclose(reached, eps.flatten(), atol=1e-5)


def test_no_steps_gives_the_random_start():
    images, noise = torch.full((2, 3, 32, 32), 0.5), torch.full((2, 3, 32, 32), EPS)
    assert torch.equal(pgd_mae(small_model(), images, EPS, ALPHA, steps=0, start_noise=noise), images + noise)
    drawn = pgd_mae(small_model(), images, EPS, ALPHA, steps=0) - images
    assert drawn.abs().max() <= EPS + 1e-7
    assert drawn.std().item() == pytest.approx(EPS / 3**0.5, rel=0.05)


def test_zero_gradient_keeps_the_pixel():
    images = torch.full((1, 3, 2, 2), 0.5)
    grad = torch.tensor([0.0, 1.0, -1.0, 0.0]).view(1, 1, 2, 2).expand(1, 3, 2, 2)
    moved = linf_step(images, images + 0.01, grad, EPS, ALPHA, 0.0, 1.0)[0, 0].flatten()
    assert moved == pytest.approx([0.51, 0.5 + EPS, 0.5 + 0.01 - ALPHA, 0.51])


def test_overflowing_gradient_keeps_the_pixel():
    images = torch.full((1, 3, 2, 2), 0.5)
    grad = torch.full_like(images, torch.nan)
    assert torch.equal(linf_step(images, images + 0.01, grad, EPS, ALPHA, 0.0, 1.0), images + (images + 0.01 - images))


def test_gradient_reaches_visible_and_masked_patches():
    """One step from the clean image: pixels move both where the encoder sees them and where only the target does."""
    images = golden_images()[2].clamp(0.2, 0.8)
    noise = load_golden("attack_unit_1step")[0]["step0_mask_noise"]
    adv = pgd_mae(small_model(), images, EPS, EPS, start_noise=torch.zeros_like(images), mask_noise=[noise])
    moved = ((adv - images).abs() > 0.9 * EPS).float()
    patches = moved.unfold(2, 4, 4).unfold(3, 4, 4).mean(dim=(1, 4, 5)).flatten(1)
    mask = small_model()(images, noise=noise)[2]
    assert patches[mask == 0].mean() > 0.99
    assert patches[mask == 1].mean() > 0.99


def test_raises_the_reconstruction_loss():
    model, images = small_model(), golden_images()[0]
    noise = torch.rand(8, 64)
    adv = pgd_mae(model, images, EPS, ALPHA / 4, steps=8, mask_noise=[noise] * 8)
    loss = [reconstruction_loss(model, x, 0.75, noise).item() for x in (images, adv)]
    assert loss[1] > 1.05 * loss[0]


def test_mask_ratio_is_its_own():
    seen = []

    def spy(model, images, mask_ratio, noise):
        seen.append(mask_ratio)
        return reconstruction_loss(model, images, mask_ratio, noise)

    pgd_mae(small_model(), golden_images()[0], steps=2, mask_ratio=0.5, loss_fn=spy)
    assert seen == [0.5, 0.5]


def test_leaves_the_model_as_it_was():
    model = small_model().train()
    pgd_mae(model, golden_images()[0], steps=2)
    assert model.training
    assert all(p.grad is None for p in model.parameters())
    assert all(p.requires_grad == ("pos_embed" not in name) for name, p in model.named_parameters())
    model.eval()
    pgd_mae(model, golden_images()[0])
    assert not model.training


def test_runs_in_eval_mode():
    modes = []
    model = small_model().train()
    hook = model.register_forward_hook(lambda *_: modes.append(model.training))
    pgd_mae(model, golden_images()[0], steps=2)
    hook.remove()
    assert modes == [False, False]


def test_works_under_no_grad_and_is_repeatable():
    model, images = small_model(), golden_images()[0]
    with torch.no_grad():
        torch.manual_seed(3)
        first = pgd_mae(model, images)
    torch.manual_seed(3)
    assert torch.equal(first, pgd_mae(model, images))


def visible_agreement(loss_scale: float) -> float:
    """Share of visible pixels whose step has the fp32 gradient's sign, under fp16 autocast, with gradients as in large runs."""
    model, images = small_model(), golden_images()[0].clamp(0.2, 0.8)
    noise = load_golden("attack_unit_1step")[0]["step0_mask_noise"]
    start = torch.zeros_like(images)

    def small_gradients(*args):
        return reconstruction_loss(*args) / 4096

    full = pgd_mae(model, images, EPS, EPS, start_noise=start, mask_noise=[noise])
    with torch.autocast("cpu", dtype=torch.float16):
        half = pgd_mae(
            model,
            images,
            EPS,
            EPS,
            start_noise=start,
            mask_noise=[noise],
            loss_scale=loss_scale,
            loss_fn=small_gradients,
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
        pgd_mae(small_model(), images, steps=-1)
    with pytest.raises(ValueError, match="mask_noise"):
        pgd_mae(small_model(), images, steps=2, mask_noise=[torch.rand(8, 64)])
