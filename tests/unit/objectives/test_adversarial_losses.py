"""The losses of adversarial training against their formulas, image by image in float64."""

import math

import pytest
import torch
from torch import Tensor

from mimir_fast.objectives.adversarial_losses import (
    attack_losses,
    cross_entropy,
    mart_loss,
    trades_loss,
)
from mimir_fast.objectives.classification import ClassificationObjective

BATCH, CLASSES, BETA = 5, 7, 3.0


@pytest.fixture
def logits() -> tuple[Tensor, Tensor, Tensor]:
    """Clean and adversarial logits far from each other, and labels: some right, some wrong."""
    clean, adv = torch.randn(2, BATCH, CLASSES, dtype=torch.float64) * 2
    labels = torch.tensor([0, 3, 6, 2, 1])
    adv[0, 0], adv[1, 3] = 9.0, -9.0
    return clean.requires_grad_(), adv.requires_grad_(), labels


def softmax(row: Tensor) -> list[float]:
    weights = [math.exp(v) for v in row.tolist()]
    return [w / sum(weights) for w in weights]


def test_trades(logits):
    clean, adv, labels = logits
    total = 0.0
    for p, q, y in zip(map(softmax, clean), map(softmax, adv), labels.tolist()):
        total += -math.log(p[y]) + BETA * sum(a * math.log(a / b) for a, b in zip(p, q))
    loss = trades_loss(clean, adv, labels, BETA)
    assert loss.item() == pytest.approx(total / BATCH, rel=1e-12)
    torch.autograd.gradcheck(lambda a, b: trades_loss(a, b, labels, BETA), (clean, adv))
    loss.backward()
    assert (clean.grad.abs().sum(dim=1) > 0).all()
    assert (adv.grad.abs().sum(dim=1) > 0).all()


def test_mart(logits):
    clean, adv, labels = logits
    total = 0.0
    for p, q, y in zip(map(softmax, clean), map(softmax, adv), labels.tolist()):
        wrong = max(value for i, value in enumerate(q) if i != y)
        divergence = sum(a * math.log(a / (b + 1e-12)) for a, b in zip(p, q))
        total += -math.log(q[y]) - math.log(1.0001 - wrong + 1e-12) + BETA * divergence * (1.0000001 - p[y])
    assert mart_loss(clean, adv, labels, BETA).item() == pytest.approx(total / BATCH, rel=1e-9)
    torch.autograd.gradcheck(lambda a, b: mart_loss(a, b, labels, BETA), (clean, adv))


def test_mixed_targets(logits):
    clean, adv, labels = logits
    soft = torch.eye(CLASSES, dtype=torch.float64)[labels]
    assert cross_entropy(clean, soft).item() == pytest.approx(cross_entropy(clean, labels).item())
    assert cross_entropy(clean, soft, 0.1).item() == pytest.approx(cross_entropy(clean, labels).item())
    smooth = soft * 0.9 + 0.1 / CLASSES
    assert cross_entropy(clean, smooth).item() == pytest.approx(cross_entropy(clean, labels, 0.1).item())
    assert torch.allclose(attack_losses(clean, soft), attack_losses(clean, labels))
    assert attack_losses(clean, labels).mean().item() == pytest.approx(cross_entropy(clean, labels).item())
    assert trades_loss(clean, adv, soft, BETA).item() == pytest.approx(trades_loss(clean, adv, labels, BETA).item())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit_logits_are_computed_in_fp32(logits, dtype):
    clean, adv, labels = (t.detach().to(dtype) if t.is_floating_point() else t for t in logits)
    for loss in (trades_loss, mart_loss):
        assert loss(clean, adv, labels, BETA).dtype == torch.float32
        want = loss(clean.double(), adv.double(), labels, BETA).item()
        assert loss(clean, adv, labels, BETA).item() == pytest.approx(want, rel=1e-5)
    assert cross_entropy(clean, labels).dtype == attack_losses(clean, labels).dtype == torch.float32


def test_certain_predictions_stay_finite():
    sure, opposite = torch.tensor([[90.0, -90.0]]), torch.tensor([[-90.0, 90.0]])
    for loss in (trades_loss, mart_loss):
        clean, adv = sure.clone().requires_grad_(), opposite.clone().requires_grad_()
        value = loss(clean, adv, torch.tensor([0]), BETA)
        value.backward()
        assert value.isfinite()
        assert clean.grad.isfinite().all()
        assert adv.grad.isfinite().all()


def test_what_does_not_go_together():
    with pytest.raises(ValueError, match="attack_train: got 'free', expected one of plain, pgd"):
        ClassificationObjective(torch.nn.Identity(), "free")
    with pytest.raises(ValueError, match="mart needs one label"):
        mart_loss(torch.zeros(2, 3), torch.zeros(2, 3), torch.full((2, 3), 1 / 3), BETA)
