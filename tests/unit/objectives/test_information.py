"""Penalties against their definitions, in float64, on awkward shapes, and where they must fail gracefully."""

import pytest
import torch

from mimir_fast.objectives.information import compared, nhsic, penalty_value, renyi_mi
from tests.oracles.textbook import textbook_hsic

SHAPES = [(2, 3, 5), (5, 1, 7), (16, 40, 33), (33, 200, 12)]


@pytest.mark.parametrize(("m", "dx", "dy"), SHAPES)
def test_nhsic_equals_its_definition(m, dx, dy):
    torch.manual_seed(m)
    x, y = torch.randn(m, dx, dtype=torch.float64), torch.randn(m, dy, dtype=torch.float64) * 3
    leaves = [[t.clone().requires_grad_() for t in (x, y)] for _ in range(2)]
    ours, truth = nhsic(*leaves[0]), textbook_hsic(*leaves[1])
    assert ours.item() == pytest.approx(truth.item(), rel=1e-9, abs=1e-9)
    ours.backward()
    truth.backward()
    for mine, exact in zip(*leaves):
        assert (mine.grad - exact.grad).abs().max() < 1e-6 * max(exact.grad.abs().max(), 1e-1)


@pytest.mark.parametrize("kernel_y", ["gaussian", "linear"])
def test_nhsic_gradcheck(kernel_y):
    torch.manual_seed(0)
    x, y = (torch.randn(6, d, dtype=torch.float64, requires_grad=True) for d in (5, 4))
    assert torch.autograd.gradcheck(
        lambda a, b: nhsic(a, b, kernel_y=kernel_y, sigma=1.0), (x, y), atol=1e-4, rtol=1e-3
    )


def test_nhsic_properties():
    torch.manual_seed(1)
    x, y = torch.randn(24, 30), torch.randn(24, 50)
    value = nhsic(x, y)
    order = torch.randperm(24)
    assert nhsic(x[order], y[order]).item() == pytest.approx(value.item(), rel=1e-5)
    assert nhsic(x + 7, y - 3).item() == pytest.approx(value.item(), rel=1e-4)  # distances do not change
    assert nhsic(y, x).item() == pytest.approx(value.item(), rel=1e-5)
    assert 0 <= value < 24
    assert torch.equal(nhsic(x, y), value)
    wide = torch.randn(30, 24).T  # not contiguous
    assert torch.equal(nhsic(wide, y), nhsic(wide.contiguous(), y))
    line, other = torch.randn(2, 64, 1)
    assert nhsic(line, line.exp()) > 1.5 * nhsic(line, other)  # grows with dependence


def test_nhsic_ignores_autocast_and_accepts_half():
    torch.manual_seed(2)
    x, y = torch.randn(16, 20), torch.randn(16, 20)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(nhsic(x, y), nhsic(x, y))
        inside = nhsic(x, y)
    assert torch.equal(inside, nhsic(x, y))
    rounded = x.bfloat16()
    assert torch.equal(nhsic(rounded, y), nhsic(rounded.float(), y))
    rounded.requires_grad_()
    nhsic(rounded, y).backward()
    assert rounded.grad.dtype == torch.bfloat16


def test_nhsic_of_nan_is_nan_without_an_exception():
    x, y = torch.randn(8, 4), torch.randn(8, 4)
    x[3, 2] = torch.nan
    assert nhsic(x, y).isnan()
    assert nhsic(y[:1], y[:1]).item() == pytest.approx(0.0, abs=1e-6)  # one sample says nothing


@pytest.mark.parametrize("m", [3, 32, 96, 200])
@pytest.mark.parametrize("alpha", [1.01, 2.0])
def test_renyi_equals_its_definition(m, alpha):
    """Also where the original needs exactly 128 samples, and with a gradient, which it does not have."""
    torch.manual_seed(m)
    x, z = torch.randn(m, 12, dtype=torch.float64), torch.randn(m, 9, dtype=torch.float64, requires_grad=True)

    def entropy(k):
        eigenvalues = torch.linalg.eigvalsh(k / k.trace()).clamp_min(0)
        return torch.log2((eigenvalues**alpha).sum()) / (1 - alpha)

    def kernel(rows):
        distances = torch.cdist(rows, rows)
        sigma = distances[:10].sort(dim=1).values.mean().detach()
        return torch.exp(-((rows[:, None] - rows[None]) ** 2).sum(-1) / sigma)

    kx, kz = kernel(x), kernel(z)
    truth = entropy(kx) + entropy(kz) - entropy(kx * kz)
    (truth_grad,) = torch.autograd.grad(truth, z)
    value = renyi_mi(x, z, alpha)
    (grad,) = torch.autograd.grad(value, z)
    assert value.item() == pytest.approx(truth.item(), rel=1e-8)
    assert (grad - truth_grad).abs().max() < 1e-7 * truth_grad.abs().max()
    assert grad.abs().max() > 0


def test_renyi_given_bandwidths_and_nan():
    torch.manual_seed(0)
    x, z = torch.randn(20, 5), torch.randn(20, 6)
    assert renyi_mi(x, z, sigma_x=2.0, sigma_z=3.0) != renyi_mi(x, z)
    z[0, 0] = torch.nan
    assert renyi_mi(x, z).isnan()
    assert renyi_mi(x, z, alpha=2.0).isnan()


def test_penalties_by_name_take_the_right_images():
    torch.manual_seed(0)
    latent, images, adv = torch.randn(6, 3, 4), torch.rand(6, 3, 8, 8), torch.rand(6, 3, 8, 8)
    flat = (latent.flatten(1), images.flatten(1), adv.flatten(1))
    expected = {"hsic": nhsic(flat[0], flat[2])}
    expected |= {kind: renyi_mi(flat[1], flat[0], alpha) for kind, alpha in (("dib_mi", 1.01), ("renyi2", 2.0))}
    for kind, value in expected.items():
        assert torch.equal(penalty_value(kind, latent, compared(kind, images, adv)), value)


def test_wrong_arguments():
    x = torch.randn(4, 3)
    for match, call in {
        "y": lambda: nhsic(x, x[:3]),
        "x": lambda: nhsic(x[0], x),
        "sigma": lambda: nhsic(x, x, sigma=0),
        "kernel_y": lambda: nhsic(x, x, kernel_y="cosine"),
        "alpha": lambda: renyi_mi(x, x, alpha=1.0),
        "z": lambda: renyi_mi(x, x[:2]),
        "mi_train": lambda: penalty_value("mine", x[:, :, None], x),
    }.items():
        with pytest.raises(ValueError, match=match):
            call()
