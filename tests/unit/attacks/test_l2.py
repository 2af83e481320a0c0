"""PGD in the L2 norm: the step and projection of its definition, starts that fill the ball, the same as torchattacks."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from mimir_fast.attacks.l2 import l2_start, l2_step, norms
from mimir_fast.attacks.linf import pgd
from mimir_fast.attacks.named import cross_entropy, gradient_attack, make_attack, start_noise
from mimir_fast.kernels import linf_bounds

EPS, ALPHA = 0.8, 0.3


@pytest.fixture(scope="module")
def setting():
    generator = torch.Generator().manual_seed(0)
    images, labels = torch.rand(6, 3, 5, 7, generator=generator, dtype=torch.float64), torch.arange(6)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(105, 6)).double().requires_grad_(False)
    model[1].weight.copy_(torch.randn(6, 105, generator=generator, dtype=torch.float64))
    return model, images, labels, linf_bounds(EPS, ALPHA, 0.0, 1.0, 3, "cpu").double()


def by_definition(images, adv, grad):
    """One image at a time, in numpy."""
    found = []
    for x, a, g in zip(images.numpy(), adv.numpy(), grad.numpy()):
        move = a + (ALPHA * g / np.sqrt((g**2).sum()) if g.any() else 0) - x
        size = np.sqrt((move**2).sum())
        found.append(np.clip(x + (move if size <= EPS else move * EPS / size), 0, 1))
    return torch.from_numpy(np.stack(found))


def test_a_step_is_its_definition(setting):
    """Planted, each was seen to fail: the sign of the gradient; a norm over the batch; no projection."""
    _, images, _, bounds = setting
    generator = torch.Generator().manual_seed(1)
    grad = torch.randn(images.shape, generator=generator, dtype=torch.float64)
    # An image without a gradient stays.
    grad[2] = 0
    adv = images
    for _ in range(4):
        expected = by_definition(images, adv, grad)
        adv = l2_step(images, adv, grad, bounds)
        torch.testing.assert_close(adv, expected, rtol=0, atol=1e-7)
    assert torch.equal(adv[2], images[2])
    assert norms(adv - images).max() <= EPS + 1e-9


def test_starts_fill_the_ball_and_belong_to_the_image(setting):
    bounds = setting[-1][:, :1].float()
    grey, numbers = torch.full((4000, 1, 2, 1), 0.5), torch.arange(4000)
    uniform = start_noise(numbers, torch.Size([3]), seed=0)
    moves = (l2_start(grey, bounds * torch.tensor([[0.5], [1], [1], [1]]), uniform) - grey).flatten(1)
    sizes = moves.norm(dim=1)
    assert sizes.max() <= EPS / 2
    # In two dimensions a quarter of the ball's area lies within half of its radius.
    assert abs((sizes < EPS / 4).float().mean() - 0.25) < 0.03
    angles = torch.atan2(moves[:, 0], moves[:, 1])
    assert abs((angles > 0).float().mean() - 0.5) < 0.03
    assert abs((angles.abs() > torch.pi / 2).float().mean() - 0.5) < 0.03
    again = l2_start(grey[:1], bounds, start_noise(numbers[7:8], torch.Size([3]), seed=0))
    assert torch.equal(again, l2_start(grey, bounds, uniform)[7:8])


def test_the_attack_stays_in_its_ball_and_climbs(setting):
    model, images, labels, _ = setting
    model, images = model.float(), images.float()
    attack = make_attack("pgd-l2-10", EPS, ALPHA)
    adv = gradient_attack(cross_entropy(model, labels), images, labels, attack, 0, 0)
    assert norms(adv - images).max() <= EPS + 1e-5
    assert norms(adv - images).min() > 0.9 * EPS
    assert adv.min() >= 0
    assert adv.max() <= 1
    start = gradient_attack(cross_entropy(model, labels), images, labels, make_attack("pgd-l2-1", EPS, 1e-9), 0, 0)
    assert (F.cross_entropy(model(adv), labels) > F.cross_entropy(model(start), labels) + 0.5).all()
    model.double()


def test_the_same_as_torchattacks(setting):
    torchattacks = pytest.importorskip("torchattacks", reason="compares with the optional package torchattacks")
    model, images, labels, bounds = setting
    theirs = torchattacks.PGDL2(model, eps=EPS, alpha=ALPHA, steps=12, random_start=False)(images, labels)
    torch.testing.assert_close(
        pgd(cross_entropy(model, labels), images, bounds, 12, step=l2_step), theirs, rtol=0, atol=1e-6
    )
