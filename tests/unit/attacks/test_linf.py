"""PGD and Auto-PGD on any loss: geometry, randomness, the authors' own numbers, no wait for the device."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mimir_fast.attacks.apgd import apgd, checkpoints, momentum_step
from mimir_fast.attacks.linf import attack_bounds, linf_step, pgd, pgd_best
from mimir_fast.attacks.pgd_mae import linf_bounds, starting_point
from tests.support.golden import BOUNDS
from tests.support.waiting import no_waiting

EPS = 8 / 255


def network(dtype: torch.dtype = torch.float32) -> nn.Module:
    """A curved classifier of [B,3,8,8]."""
    torch.manual_seed(4)
    net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.GELU(), nn.Flatten(), nn.Linear(512, 5))
    for parameter in net.parameters():
        parameter.data *= 3
    return net.to(dtype).requires_grad_(False)


def losses_of(net: nn.Module, images: Tensor):
    labels = net(images).argmax(dim=1)
    return lambda adv: F.cross_entropy(net(adv), labels, reduction="none")


def some_images(count: int = 6, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.rand(count, 3, 8, 8, generator=torch.Generator().manual_seed(1), dtype=dtype)


def test_a_step_moves_projects_and_leaves_pixels_without_gradient():
    images = torch.tensor([0.5, 0.5, 0.5, 0.5, 0.99, 0.01]).view(1, 3, 1, 2)
    adv = images + torch.tensor([0.0, 0.02, 0.03, -0.01, 0.0, 0.0]).view(1, 3, 1, 2)
    grad = torch.tensor([3.0, 0.0, 1e-9, -2.0, 1.0, -1.0]).view(1, 3, 1, 2)
    bounds = linf_bounds(0.04, torch.tensor([0.01, 0.02, 0.03]), 0.0, 1.0, 3, "cpu")
    moved = linf_step(images, adv, grad, bounds).flatten()
    assert torch.allclose(moved, torch.tensor([0.51, 0.52, 0.54, 0.47, 1.0, 0.0]), atol=1e-6)
    assert moved[1] == adv.flatten()[1]
    poisoned = linf_step(images, adv, torch.full_like(grad, torch.nan), bounds)
    assert torch.allclose(poisoned, adv)


def test_bounds_are_those_of_pixels_in_the_images_own_units():
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.25, 0.5)
    eps, alpha, lo, hi = attack_bounds(8, 2, "cpu", mean=mean, std=std)
    x = torch.stack([lo, hi]) * torch.tensor(std) + torch.tensor(mean)
    assert torch.allclose(x, torch.tensor([[0.0], [1.0]]).expand(2, 3), atol=1e-6)
    assert torch.allclose(eps * torch.tensor(std), torch.full((3,), 8 / 255))
    assert torch.allclose(alpha * torch.tensor(std), torch.full((3,), 2 / 255))
    assert torch.equal(attack_bounds(8, 2, "cpu"), linf_bounds(8 / 255, 2 / 255, 0.0, 1.0, 3, "cpu"))


@pytest.mark.parametrize("attack", [pgd, pgd_best, apgd])
@pytest.mark.parametrize("start", [None, torch.tensor(7)])
def test_stays_in_the_ball_and_the_range_and_raises_the_loss(attack, start):
    net, images = network(), some_images()
    losses = losses_of(net, images)
    adv = attack(losses, images, BOUNDS, 5, start)
    assert (adv - images).abs().max() <= EPS + 1e-7
    assert adv.min() >= 0
    assert adv.max() <= 1
    assert not adv.requires_grad
    assert (losses(adv) > losses(images)).all()
    assert torch.equal(adv, attack(losses, images, BOUNDS, 5, start))


@pytest.mark.parametrize("attack", [pgd, pgd_best, apgd])
def test_bounds_of_each_channel(attack):
    images = some_images() * 4 - 2
    lo, hi = torch.tensor([-1.0, -1.5, -2.0]), torch.tensor([1.0, 1.5, 2.0])
    images = torch.minimum(torch.maximum(images, lo.view(3, 1, 1)), hi.view(3, 1, 1))
    eps = torch.tensor([0.1, 0.2, 0.3])
    bounds = linf_bounds(eps, eps / 2, lo, hi, 3, "cpu")
    adv = attack(losses_of(network(), images), images, bounds, 4)
    assert ((adv >= lo.view(3, 1, 1)) & (adv <= hi.view(3, 1, 1))).all()
    assert torch.allclose((adv - images).abs().amax(dim=(0, 2, 3)), eps, atol=1e-6)


@pytest.mark.parametrize("attack", [pgd, pgd_best, apgd])
def test_starts(attack):
    images, noise = some_images(), torch.full((6, 3, 8, 8), 0.01)
    losses = losses_of(network(), images)
    assert torch.equal(attack(losses, images, BOUNDS, 0), images)
    assert torch.equal(attack(losses, images, BOUNDS, 0, noise), (images + noise).clamp(0, 1))
    seeded = attack(losses, images, BOUNDS, 0, torch.tensor(7))
    assert torch.equal(seeded, starting_point(images, BOUNDS, torch.tensor(7)))
    with pytest.raises(ValueError, match="steps"):
        attack(losses, images, BOUNDS, -1)


@pytest.mark.parametrize("attack", [pgd, pgd_best, apgd])
def test_an_image_does_not_depend_on_its_batch(attack):
    net, images = network(torch.float64), some_images(dtype=torch.float64)
    labels = net(images).argmax(dim=1)

    def run(which):
        return attack(lambda adv: F.cross_entropy(net(adv), labels[which], reduction="none"), images[which], BOUNDS, 20)

    order = torch.tensor([3, 1, 5])
    assert torch.allclose(run(order), run(torch.arange(6))[order], atol=1e-9)


@pytest.mark.parametrize("shared", [False, True])
def test_pgd_best_keeps_the_iterate_of_the_highest_loss(shared):
    """On a loss with many hills: which iterate is the best differs from image to image."""
    images = some_images(32, torch.float64)
    smooth = losses_of(network(torch.float64), images)

    def losses(adv):
        return torch.sin(30 * smooth(adv))

    bounds = linf_bounds(0.4, 0.8, 0.0, 1.0, 3, "cpu").double()
    points = torch.stack([pgd(losses, images, bounds, n, torch.tensor(1)) for n in range(4)])
    values = torch.stack([losses(point) for point in points])
    best = values.mean(dim=1).argmax().repeat(32) if shared else values.argmax(dim=0)
    adv = pgd_best(losses, images, bounds, 3, torch.tensor(1), shared=shared)
    assert torch.equal(adv, points[best, torch.arange(32)])
    assert len(values.argmax(dim=0).unique()) > 1
    assert not torch.equal(adv, points[-1])


def test_pgd_best_without_a_step_size_is_its_start():
    images = some_images()
    bounds = linf_bounds(EPS, 0.0, 0.0, 1.0, 3, "cpu")
    adv = pgd_best(losses_of(network(), images), images, bounds, 3, torch.tensor(7))
    assert torch.equal(adv, starting_point(images, bounds, torch.tensor(7)))


def test_two_steps_of_apgd_by_hand():
    """What adversarial training runs: a step of 2 eps, one with momentum, the best of three."""
    images = some_images(32, torch.float64)
    losses = losses_of(network(torch.float64), images)

    def project(adv):
        return torch.maximum(torch.minimum(adv, images + EPS), images - EPS).clamp(0, 1)

    def sign(adv):
        leaf = adv.clone().requires_grad_()
        return torch.autograd.grad(losses(leaf).sum(), leaf)[0].sign()

    first = project(images + 2 * EPS * sign(images))
    second = project(first + 0.75 * (project(first + 2 * EPS * sign(first)) - first) + 0.25 * (first - images))
    points = torch.stack([images, first, second])
    best = torch.stack([losses(point) for point in points]).argmax(dim=0)
    assert len(best.unique()) > 1
    adv = apgd(losses, images, BOUNDS.double(), 2)
    assert torch.allclose(adv, points[best, torch.arange(32)], atol=1e-7)  # bounds are rounded to fp32


def test_apgd_returns_the_best_point_it_saw():
    images, seen = some_images(), []
    losses = losses_of(network(), images)

    def spy(adv):
        seen.append(losses(adv).detach())
        return losses(adv)

    adv = apgd(spy, images, linf_bounds(0.3, 0.0, 0.0, 1.0, 3, "cpu"), 12)
    assert len(seen) == 13
    assert torch.equal(losses(adv), torch.stack(seen).amax(dim=0))


def test_checkpoints_of_apgd():
    assert checkpoints(2) == {1: 1, 2: 1}
    assert list(checkpoints(100)) == [22, 41, 57, 70, 80, 87, 93, 99]


@pytest.mark.parametrize("steps", [1, 2, 3, 5, 20])
def test_apgd_is_its_authors(steps):
    """On a loss so flat at eps 0.3 that steps are halved and iterates go back."""
    base = pytest.importorskip("pyautoattack.autopgd_base", reason="package pyautoattack (extra eval) is not installed")
    net, images = network(torch.float64), some_images(16, torch.float64)
    labels, noise = net(images).argmax(dim=1), (some_images(16, torch.float64) * 2 - 1) * 0.25
    bounds = torch.tensor([[0.25] * 3, [0.0] * 3, [0.0] * 3, [1.0] * 3])
    theirs = base.APGDAttack(net, n_iter=steps, norm="Linf", eps=0.25, loss="ce", device="cpu", seed=0)
    theirs.init_hyperparam(images)
    expected = theirs.attack_single_run(images, labels, x_init=(images + noise).clamp(0, 1))[0]
    adv = apgd(losses_of(net, images), images, bounds, steps, noise)
    assert ((adv - expected).abs() > 1e-6).float().mean() < 0.01


def test_halving_and_momentum_matter():
    """The plant for the test before: without going back and halving, twenty steps end elsewhere."""
    images = some_images(16, torch.float64)
    losses = losses_of(network(torch.float64), images)
    bounds = linf_bounds(0.25, 0.0, 0.0, 1.0, 3, "cpu").double()

    def whole_steps(images, adv, last, grad, size_B, bounds):
        return momentum_step(images, adv, last, grad, torch.full_like(size_B, 2.0), bounds)

    adv, other = apgd(losses, images, bounds, 20), apgd(losses, images, bounds, 20, move=whole_steps)
    assert losses(adv).mean() >= losses(other).mean()
    assert (adv != other).float().mean() > 0.01


@pytest.mark.parametrize("attack", [pgd, pgd_best, apgd])
def test_fp16_gradients_need_the_loss_scale(attack):
    weights = torch.randn(3, 8, 8).half() * 1e-4

    def losses(adv):
        return (adv.half() * weights).float().sum(dim=(1, 2, 3)) * 1e-5

    images = some_images() * 0.5 + 0.25
    assert torch.equal(attack(losses, images, BOUNDS, 2), images)
    adv = attack(losses, images, BOUNDS, 2, loss_scale=65536.0)
    assert ((adv - images).sign() == weights.sign()).float().mean() > 0.9


@pytest.mark.parametrize("attack", [pgd, pgd_best, apgd])
def test_nothing_waits_for_the_device(attack):
    images = some_images()
    losses = losses_of(network(), images)
    with no_waiting():
        attack(losses, images, BOUNDS, 12, torch.tensor(3))
