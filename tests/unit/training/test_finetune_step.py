"""The fine-tuning step: what it trains, what it draws, what it leaves alone, and that nothing waits."""

import itertools

import pytest
import torch
from torch import Tensor, nn

from mimir_fast.attacks.pgd_mae import frozen_twin, linf_bounds
from mimir_fast.config.choices import TRAINING_ATTACKS
from mimir_fast.models import VisionTransformer
from mimir_fast.objectives.classification import ClassificationObjective, information_term
from mimir_fast.objectives.information import renyi_mi
from mimir_fast.training.finetune_step import (
    ClassifierAttack,
    ClassifierAttackFunctions,
    attack_images,
    draw_noise,
    finetune_step,
    image_logits,
)
from tests.golden.test_classifier import CIFAR10, SIZES, labels, recorded_classifier
from tests.support.golden import golden_images
from tests.support.waiting import no_waiting

BOUNDS = linf_bounds(8 / 255, 4 / 255, 0.0, 1.0, 3, "cpu")
ATTACKED = TRAINING_ATTACKS[1:]


def classifier(drop_path: float = 0.0, **options) -> VisionTransformer:
    model = VisionTransformer(**SIZES, drop_path=drop_path, **options)
    model.load_state_dict(recorded_classifier().state_dict())
    return model


def step(model: VisionTransformer, kind: str, seed: int = 0, batch: int = 0, targets: Tensor | None = None):
    images, attack = golden_images()[batch], ClassifierAttack(kind, 2, BOUNDS)
    noise = draw_noise(torch.Generator().manual_seed(seed), model, images, attack)
    targets = labels() if targets is None else targets
    return finetune_step(
        ClassificationObjective(model, kind), frozen_twin(model).eval(), images, targets, noise, attack
    )


@pytest.mark.parametrize("kind", TRAINING_ATTACKS)
def test_trains_everything_and_adds_to_gradients_that_are_there(kind):
    """The original's TRADES and MART clear the gradients: two micro-batches would count as the second alone."""
    model, single = classifier(0.1), []
    for batch in (0, 1):
        step(model, kind, batch, batch).loss.backward()
        single.append({name: p.grad.clone() for name, p in model.named_parameters()})
        model.zero_grad()
    assert all(grad.abs().sum() > 0 for grad in single[0].values())
    for batch in (0, 1):
        step(model, kind, batch, batch).loss.backward()
    for name, p in model.named_parameters():
        assert torch.allclose(p.grad, single[0][name] + single[1][name], atol=1e-7), name


@pytest.mark.parametrize("kind", ATTACKED)
def test_attacks_and_reports_the_attacked_images(kind):
    model, images = classifier(), golden_images()[0]
    output = step(model, kind)
    delta = output.adv - images
    assert 6 / 255 < delta.abs().max() <= 8 / 255 + 1e-7
    assert output.adv.min() >= 0
    assert output.adv.max() <= 1
    assert torch.allclose(output.logits, model(output.adv), atol=1e-6)
    assert not output.logits.requires_grad
    assert all(p.grad is None for p in model.parameters())
    loss = [torch.nn.functional.cross_entropy(model(x), labels()) for x in (images, output.adv)]
    assert loss[1] > loss[0]


def test_plain_is_the_clean_loss():
    model = classifier()
    output = step(model, "plain")
    assert output.adv is not None
    assert torch.equal(output.adv, golden_images()[0])
    assert output.loss.item() == pytest.approx(torch.nn.functional.cross_entropy(model(output.adv), labels()).item())


@pytest.mark.parametrize("kind", TRAINING_ATTACKS)
def test_a_step_is_a_function_of_its_seed(kind):
    model = classifier(0.5)
    first, again, other = (step(model, kind, seed) for seed in (3, 3, 4))
    assert torch.equal(first.loss, again.loss)
    assert torch.equal(first.adv, again.adv)
    assert first.loss != other.loss
    assert torch.equal(first.adv, other.adv) == (kind in ("plain", "apgd"))  # these start from the images


def test_draws():
    images, generator = golden_images()[0], torch.Generator().manual_seed(0)
    shapes = {}
    for kind in TRAINING_ATTACKS:
        noise = draw_noise(generator, classifier(0.1), images, ClassifierAttack(kind, 2, BOUNDS))
        shapes[kind] = (None if noise.start is None else tuple(noise.start.shape), tuple(noise.drop.shape))
    one, both, whole = (2, 2, 8), (2, 2, 16), (8, 3, 32, 32)
    assert shapes == {
        "plain": (None, one),
        "pgd": ((), one),
        "apgd": (None, one),
        "pgd_best": ((), one),
        "trades": (whole, both),
        "mart": (whole, both),
    }
    assert draw_noise(generator, classifier(), images, ClassifierAttack("pgd", 2, BOUNDS)).drop is None


@pytest.mark.parametrize("kind", ATTACKED)
def test_stochastic_depth_trains_and_does_not_attack(kind):
    images, attack = golden_images()[0], ClassifierAttack(kind, 2, BOUNDS)
    outputs = []
    for rate in (0.0, 0.9):
        model = classifier(rate)
        noise = draw_noise(torch.Generator().manual_seed(0), model, images, attack)
        outputs.append(
            finetune_step(
                ClassificationObjective(model, kind), frozen_twin(model).eval(), images, labels(), noise, attack
            )
        )
    assert torch.equal(outputs[0].adv, outputs[1].adv)
    assert outputs[0].loss != outputs[1].loss


@pytest.mark.parametrize("kind", ["pgd", "trades", "mart"])
def test_normalised_images_are_attacked_as_pixels(kind):
    """Constants inside of the model and limits in pixels, or normalised images and limits: the same attack."""
    images, mean, std = golden_images()[0], *(torch.tensor(c) for c in CIFAR10)
    start = torch.randn(images.shape) * (8 / 255 / 3 if kind == "pgd" else 1)
    inside = classifier(mean=CIFAR10[0], std=CIFAR10[1])
    adv = attack_images(frozen_twin(inside), images, labels(), start, ClassifierAttack(kind, 3, BOUNDS))
    bounds = linf_bounds(8 / 255 / std, 4 / 255 / std, (0 - mean) / std, (1 - mean) / std, 3, "cpu")
    mean, std = mean.view(-1, 1, 1), std.view(-1, 1, 1)
    outside = start / std if kind == "pgd" else start
    other = attack_images(
        frozen_twin(classifier()), (images - mean) / std, labels(), outside, ClassifierAttack(kind, 3, bounds)
    )
    assert ((other * std + mean - adv).abs() > 1e-5).float().mean() < 0.01
    assert ((adv - images).abs() > 2 / 255).float().mean() > 0.5


@pytest.mark.parametrize("kind", ["xyz", "plain"])
def test_an_attack_that_is_none_is_an_error(kind):
    attack = ClassifierAttack(kind, 1, linf_bounds(8 / 255, 2 / 255, 0.0, 1.0, 3, "cpu"))
    with pytest.raises(ValueError, match=f"kind: got '{kind}', expected one of pgd, trades, mart, apgd"):
        attack_images(nn.Identity(), torch.zeros(1, 3, 2, 2), torch.zeros(1), None, attack)


def test_only_mixed_targets_share_an_iterate():
    """As in ARES, whose loss of mixed targets is one number for the batch, and of labels one per image."""
    images, model = golden_images()[0], frozen_twin(classifier())
    soft = torch.eye(10)[labels()] * 0.7 + torch.eye(10)[labels().flip(0)] * 0.3
    found = {}
    for shared, targets in itertools.product((False, True), (soft, labels())):
        # Steps as long as the radius, so that the last iterate is not every image's best.
        attack = ClassifierAttack("pgd_best", 4, linf_bounds(0.5, 0.5, 0.0, 1.0, 3, "cpu"), shared=shared)
        found[shared, targets.ndim] = attack_images(model, images, targets, torch.tensor(3), attack)
    assert torch.equal(found[False, 1], found[True, 1])
    assert not torch.equal(found[False, 2], found[True, 2])


def test_trades_computes_the_clean_prediction_once():
    calls = []

    def spy(model, images):
        calls.append(images)
        return image_logits(model, images)

    images, attack = golden_images()[0], ClassifierAttack("trades", 4, BOUNDS)
    start = torch.randn(images.shape)
    attack_images(frozen_twin(classifier()), images, labels(), start, attack, ClassifierAttackFunctions(logits=spy))
    assert len(calls) == 1
    assert torch.equal(calls[0], images)


@pytest.mark.parametrize("kind", ["plain", "pgd", "pgd_best", "apgd", "trades"])
def test_mixed_targets(kind):
    soft = torch.eye(10)[labels()] * 0.7 + torch.eye(10)[labels().flip(0)] * 0.3
    mixed, hard = step(classifier(), kind, targets=soft), step(classifier(), kind)
    assert mixed.loss != hard.loss
    if kind not in ("plain", "trades"):
        assert not torch.equal(mixed.adv, hard.adv)


def test_information_term_has_a_gradient():
    """I(images; tokens) pulls, I(logits; tokens) pushes; the original's has no gradient at all."""
    model, images = classifier(), golden_images()[0]
    tokens = model.forward_features(images)
    logits = model.classify(tokens)
    want = 0.3 * renyi_mi(images.flatten(1), tokens.flatten(1)) - 0.2 * renyi_mi(logits, tokens.flatten(1))
    assert information_term((0.3, 0.2), images, tokens, logits).item() == pytest.approx(want.item(), rel=1e-6)
    losses, gradients = [], []
    for information in (None, (0.3, 0.2)):
        loss = ClassificationObjective(model, information=information)(images, images, labels()).loss
        losses.append(loss.item())
        gradients.append(torch.autograd.grad(loss, model.cls_token)[0])
    assert losses[1] - losses[0] == pytest.approx(want.item(), rel=1e-4)
    assert not torch.allclose(*gradients, rtol=1e-2)


@pytest.mark.parametrize("kind", TRAINING_ATTACKS)
def test_nothing_waits_for_the_device(kind):
    model, images, attack, generator = (
        classifier(0.1),
        golden_images()[0],
        ClassifierAttack(kind, 2, BOUNDS),
        torch.Generator(),
    )
    objective, attacked, targets = ClassificationObjective(model, kind), frozen_twin(model).eval(), labels()
    with no_waiting():
        noise = draw_noise(generator, model, images, attack)
        finetune_step(objective, attacked, images, targets, noise, attack).loss.backward()
