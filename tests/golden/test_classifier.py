"""Numbers recorded from the original code's fine-tuning: state, forward, gradients, attacks, TRADES and MART."""

import numpy as np
import pytest
import torch
from torch import Tensor

from mimir_fast.attacks.pgd_mae import frozen_twin, linf_bounds
from mimir_fast.checkpoints.transfer import load_pretrained, match_encoder
from mimir_fast.models import VisionTransformer
from mimir_fast.models.families.vit import resize_positions
from mimir_fast.objectives.adversarial_losses import cross_entropy
from mimir_fast.objectives.classification import ClassificationObjective
from mimir_fast.training.finetune_step import ClassifierAttack, ClassifierNoise, attack_images, finetune_step
from mimir_fast.training.layer_decay import parameter_groups
from tests.support.golden import golden_images, load_golden

SIZES = {"img_size": 32, "patch_size": 4, "embed_dim": 48, "depth": 2, "num_heads": 3, "num_classes": 10}
CIFAR10 = ((0.4914, 0.4822, 0.4465), (0.2471, 0.2435, 0.2616))


def recorded_classifier() -> VisionTransformer:
    """The encoder of the recorded pre-training model under its recorded head."""
    model = VisionTransformer(**SIZES)
    encoder, own = load_golden("mae_state")[0], load_golden("vit_state")[0]
    model.load_state_dict({key: own.get(key, encoder.get(key)) for key in model.state_dict()})
    return model


def labels() -> Tensor:
    return load_golden("vit_forward")[0]["labels"]


def signs(packed: Tensor, shape: torch.Size) -> list[Tensor]:
    """The recorded gradients' signs of every step: +-1 of the given shape (no recorded gradient is zero)."""
    rows = np.unpackbits(packed.numpy(), axis=1).astype(np.float32)
    return [torch.from_numpy(row * 2 - 1).view(shape) for row in rows]


def test_state_dict_and_what_a_pretrained_encoder_gives():
    _, record = load_golden("vit_state")
    model, encoder = VisionTransformer(**SIZES), load_golden("mae_state")
    assert list(model.state_dict()) == record["key_order"]
    assert all(p.requires_grad for p in model.parameters())
    given = {key: encoder[0][key] for key in encoder[1]["key_order"]}
    match = match_encoder(model, given, "recorded")
    assert match.missing == record["missing"]
    assert match.unexpected == record["unexpected"]
    load_pretrained(model, given, "recorded", lambda _: None, 0.02)
    want = recorded_classifier().state_dict()
    assert all(torch.equal(model.state_dict()[key], want[key]) for key in match.tensors)


def test_forward_and_losses():
    tensors, record = load_golden("vit_forward")
    model, images = recorded_classifier(), golden_images()[0]
    logits = model(images)
    assert (logits - tensors["logits"]).abs().max() < 1e-6
    assert (model.forward_features(images)[:2, ::8] - tensors["features"]).abs().max() < 5e-6
    assert cross_entropy(logits, labels()).item() == pytest.approx(record["ce"], abs=1e-6)
    assert cross_entropy(logits, labels(), 0.1).item() == pytest.approx(record["label_smoothing_0p1"], abs=1e-6)
    soft = cross_entropy(logits, tensors["soft_labels"], 0.1)
    assert soft.item() == pytest.approx(record["soft_target_ce"], abs=1e-6)


def test_gradients():
    truth, _ = load_golden("vit_grads")
    model = recorded_classifier()
    cross_entropy(model(golden_images()[0]), labels(), 0.1).backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    gradients["pos_embed"] = gradients["pos_embed"][:, ::8]
    assert len(truth) > 20
    for name, grad in truth.items():
        assert (gradients[name] - grad).abs().max() < 1e-5 * grad.abs().max(), name


@pytest.mark.parametrize("kind", ["unit", "norm"])
def test_pgd_to_the_last_pixel(kind):
    tensors, record = load_golden(f"vit_attack_{kind}_2step")
    mean, std = (torch.tensor(c) if record["normalised"] else torch.tensor(d) for c, d in zip(CIFAR10, (0.0, 1.0)))
    eps, alpha, lo, hi = record["eps_255"] / 255 / std, record["alpha_255"] / 255 / std, -mean / std, (1 - mean) / std
    images = (golden_images()[0][:1] - mean.view(-1, 1, 1)) / std.view(-1, 1, 1)
    attack = ClassifierAttack("pgd", record["steps"], linf_bounds(eps, alpha, lo, hi, 3, "cpu"))
    model = frozen_twin(recorded_classifier()).eval()
    adv = attack_images(model, images, labels()[:1], tensors["start_noise"], attack)
    eps, alpha, lo, hi = (t.view(-1, 1, 1) for t in (eps, alpha, lo, hi))
    expected = torch.clamp(images + tensors["start_noise"], lo, hi)
    for sign in signs(tensors["signs"], images.shape):
        expected = torch.clamp(images + torch.clamp(expected + alpha * sign - images, -eps, eps), lo, hi)
    assert torch.equal(adv, expected)


@pytest.mark.parametrize(("kind", "loss_bound", "grad_bound"), [("trades", 1e-5, 1e-3), ("mart", 1e-6, 2e-5)])
def test_trades_and_mart(kind, loss_bound, grad_bound):
    """The recorded start is rounded to 1/28 of its deviation; the first gradient of TRADES is little more than rounding."""
    tensors, record = load_golden(f"vit_{kind}")
    model, images = recorded_classifier(), golden_images()[0]
    eps, alpha = record["epsilon_255"] / 255, record["step_size_255"] / 255
    attack = ClassifierAttack(
        kind, record["perturb_steps"], linf_bounds(eps, alpha, 0.0, 1.0, 3, "cpu"), beta=record["beta"]
    )
    noise = ClassifierNoise(tensors["start_randn_x28"].float() / 28)
    objective = ClassificationObjective(model, kind, beta=attack.beta)
    output = finetune_step(objective, frozen_twin(model).eval(), images, labels(), noise, attack)
    expected = (images + 0.001 * noise.start)[:2]
    for sign in signs(tensors["signs"], expected.shape):
        expected = torch.clamp(images[:2] + torch.clamp(expected + alpha * sign - images[:2], -eps, eps), 0, 1)
    assert ((output.adv[:2] - expected).abs() > 1e-6).float().mean() < 0.01
    assert output.loss.item() == pytest.approx(record["loss"], abs=loss_bound)
    output.loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    for name in ("cls_token", "fc_norm.weight", "head.weight", "head.bias"):
        assert (gradients[name] - tensors[name]).abs().max() < grad_bound * tensors[name].abs().max(), name


def test_positional_table_of_another_grid():
    tensors, record = load_golden("pos_embed_interp")
    assert (resize_positions(tensors["old"], record["new_grid"]) - tensors["new"]).abs().max() < 1e-6
    assert resize_positions(tensors["old"], record["old_grid"]) is tensors["old"]


@pytest.mark.parametrize("decay", ["0.65", "0.75"])
def test_layer_decay(decay):
    _, record = load_golden("layer_decay_depth12")
    model = VisionTransformer(**(SIZES | {"depth": 12}))
    names = {id(p): name for name, p in model.named_parameters()}
    groups = parameter_groups(model, 0.05, float(decay))
    assert [[names[id(p)] for p in group["params"]] for group in groups] == record["params"]
    assert [group["lr_scale"] for group in groups] == pytest.approx(record["lr_scale"][decay], rel=1e-12)
    assert [group["weight_decay"] for group in groups] == record["weight_decay"]
