"""Attacks of the evaluation: the right losses, one image at a time, as other packages do them."""

import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from mimir_fast.attacks.adaptive import feature_loss, mutual_information_loss
from mimir_fast.attacks.linf import attack_bounds, pgd
from mimir_fast.attacks.named import cross_entropy, fgsm, gradient_attack, margin, start_noise
from mimir_fast.checkpoints.errors import CheckpointError
from mimir_fast.config.evaluation import EvaluateConfig
from mimir_fast.data.crops import to_float
from mimir_fast.evaluate import (
    Attack,
    Images,
    Sizes,
    configured,
    make_attack,
    original_sequence,
    parse_attacks,
    rounds,
    run_evaluation,
)
from mimir_fast.evaluate.records import ROBUST
from mimir_fast.evaluate.statistics import sign_test, wilson
from mimir_fast.models import VisionTransformer
from tests.support.classifiers import Loud, classifier, digits, one_thread, untrained  # noqa: F401
from tests.support.tape import Tape

SILENT = {"say": lambda line: None}


def batch(count: int = 6):
    images, labels = next(iter(digits(count).stream(count, np.arange(count))))
    return to_float(images), labels


def small_vit() -> VisionTransformer:
    model = VisionTransformer(
        img_size=8, patch_size=4, num_classes=4, embed_dim=12, depth=1, num_heads=2, mlp_ratio=2.0
    )
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model.double().requires_grad_(False)


def test_names():
    attacks = parse_attacks("clean,fgsm,pgd-20,pgd-7,cw,cw-30,aa,pgd-mi,pgd-feature-10", 8, 2, restarts=3, weight=1e-4)
    assert [a.name for a in attacks] == [
        "clean", "fgsm", "pgd-20", "pgd-7", "cw-100", "cw-30", "aa", "pgd-mi-100", "pgd-feature-10"
    ]  # fmt: skip
    assert attacks[3] == Attack("pgd", 7, 8, 2, 3)
    assert attacks[7] == Attack("pgd-mi", 100, 8, 2, 3, 1e-4)
    for wrong in ("", "pgd-0", "pgd-x", "bim", "fgsm-2", "clean,,fgsm", "pgd-", "aa-3"):
        with pytest.raises(ValueError, match=r"attacks: .* is no attack; expected clean, fgsm"):
            parse_attacks(wrong, 8, 2)


def test_original_sequence():
    words = [(a.name, a.eps, a.alpha) for a in original_sequence(8, 2)]
    assert words == [("clean", 0, 0), ("pgd-5", 1, 0.5), ("pgd-20", 8, 2), ("pgd-100", 8, 2), ("aa", 8, 0)]
    assert [a.name for a in original_sequence(8, 2, adaptive=True)] == ["clean", "pgd-feature-100", "pgd-mi-100"]


def test_start_noise_belongs_to_the_image():
    shape, numbers = torch.Size((3, 5, 5)), torch.tensor([7, 3, 100000])
    noise = start_noise(numbers, shape, seed=1)
    assert torch.equal(start_noise(numbers[1:2], shape, seed=1)[0], noise[1])
    drawn = [noise, start_noise(numbers, shape, 2), start_noise(numbers, shape, 1, restart=1), noise.roll(1, 0)]
    assert all((a != b).float().mean() > 0.9 for a, b in itertools.combinations(drawn, 2))
    many = start_noise(torch.arange(400), shape, seed=0)
    assert many.min() >= -1
    assert many.max() < 1
    assert many.abs().max() > 0.999
    assert abs(many.mean()) < 0.02
    assert abs(many.var() - 1 / 3) < 0.01
    assert np.corrcoef(many.flatten(1).T.numpy())[0, 1:].max() < 0.3  # neighbouring pixels are independent


def test_an_images_result_does_not_depend_on_the_batch(tmp_path):
    attacks = parse_attacks("fgsm,pgd-5,cw-5", 12, 4, restarts=2)
    runs = []
    for size in (1, 7, 32):
        folder = tmp_path / str(size)
        data = run_evaluation(classifier(), "toy", digits(20), attacks, folder, sizes=Sizes(size, 64), **SILENT)
        runs.append([dict(np.load(folder / entry["per_image"])) for entry in data["attacks"].values()])
    assert all(0 < (record["broken"] == ROBUST).sum() < 20 for record in runs[0][1:])
    for other in runs[1:]:
        for mine, theirs in zip(runs[0], other):
            for name in ("number", "label", "broken", "rounds", "prediction"):
                assert np.array_equal(mine[name], theirs[name]), name
            np.testing.assert_allclose(mine["loss"], theirs["loss"], rtol=1e-3)


def test_margin():
    logits = torch.tensor([[1.0, 4.0, 2.0], [5.0, 1.0, 0.0]])
    assert margin(logits, torch.tensor([1, 2])).tolist() == [-2.0, 5.0]


def test_cw_climbs_the_margin_where_the_cross_entropy_is_flat():
    images, labels = batch()
    model, attack = Loud(classifier()).requires_grad_(False), make_attack("cw-10", 24, 6)
    labels = model(images).argmax(1)
    data = (images, torch.arange(len(images)), attack, 0, 0)
    flat = gradient_attack(cross_entropy(model, labels), *data)
    climbed = gradient_attack(lambda adv: margin(model(adv), labels).sum(), *data)
    assert margin(model(climbed), labels).mean() > margin(model(flat), labels).mean() + 1e3


def test_fgsm():
    images, labels = batch()
    model = classifier().requires_grad_(False)
    leaf = images.clone().requires_grad_()
    (grad,) = torch.autograd.grad(F.cross_entropy(model(leaf), labels), leaf)
    expected = (images + 8 / 255 * grad.sign()).clamp(0, 1)
    torch.testing.assert_close(fgsm(model, images, labels, 8), expected)


def test_pgd_agrees_with_torchattacks():
    torchattacks = pytest.importorskip("torchattacks", reason="compares with the optional package torchattacks")
    images, labels = (x.double() if x.is_floating_point() else x for x in batch(8))
    model = classifier().double().eval().requires_grad_(False)
    eps, alpha = 8 / 255, 2 / 255
    torch.manual_seed(3)
    theirs = torchattacks.PGD(model, eps=eps, alpha=alpha, steps=10, random_start=True)(images, labels)
    torch.manual_seed(3)
    noise = torch.empty_like(images).uniform_(-eps, eps)
    ours = pgd(cross_entropy(model, labels), images, attack_bounds(8, 2, "cpu"), 10, noise)
    assert (ours - images).abs().max() > 0.9 * eps
    torch.testing.assert_close(ours, theirs, atol=1e-7, rtol=0)
    one = torchattacks.FGSM(model, eps=eps)(images, labels)
    torch.testing.assert_close(fgsm(model, images, labels, 8), one, atol=1e-7, rtol=0)


def nhsic_by_definition(x_md, y_me, sigma=5.0):
    """Unsymmetric form with plain inverses, as published."""

    def ratio(rows):
        m, d = rows.shape
        kernel = torch.exp(-torch.cdist(rows, rows).square() / (2 * sigma**2 * d))
        centred = kernel @ (torch.eye(m) - 1 / m).to(rows)
        return centred @ torch.linalg.inv(centred + 1e-5 * m * torch.eye(m).to(rows))

    return torch.trace(ratio(x_md) @ ratio(y_me))


def test_pgd_mi_differentiates_both_arguments():
    model, images, labels = small_vit(), torch.rand(5, 3, 8, 8).double(), torch.tensor([0, 1, 2, 3, 0])
    adv = images.clone().requires_grad_()
    tokens = model.forward_features(adv)
    truth = F.cross_entropy(model(adv), labels) + 0.5 * nhsic_by_definition(tokens.flatten(1), adv.flatten(1))
    (expected,) = torch.autograd.grad(truth, adv, retain_graph=True)
    value = mutual_information_loss(model, labels, 0.5)(adv)
    (grad,) = torch.autograd.grad(value, adv)
    torch.testing.assert_close(value, truth, rtol=1e-8, atol=0)
    torch.testing.assert_close(grad, expected, rtol=0, atol=1e-6 * expected.abs().max().item())
    # and the definition is differentiated rightly, as differences say
    direction, h = torch.randn_like(images), 1e-5
    loss = mutual_information_loss(model, labels, 0.5)
    slope = (loss(images + h * direction) - loss(images - h * direction)) / (2 * h)
    torch.testing.assert_close(slope, (grad * direction).sum(), rtol=1e-5, atol=0)


def test_pgd_feature_is_the_frobenius_norms_attack():
    model, images = small_vit(), torch.rand(4, 3, 8, 8).double()
    adv = (images + 0.02 * torch.randn_like(images)).requires_grad_()
    norm = torch.linalg.norm(model.forward_features(adv) - model.forward_features(images))
    (original,) = torch.autograd.grad(norm, adv)
    (ours,) = torch.autograd.grad(feature_loss(model, images)(adv), adv)
    torch.testing.assert_close(ours, 2 * norm.detach() * original)


@pytest.mark.parametrize("name", ["pgd-mi-3", "pgd-feature-3"])
def test_adaptive_attacks_run(tmp_path, name):
    model = VisionTransformer(img_size=32, patch_size=8, num_classes=10, embed_dim=24, depth=1, num_heads=2)
    data = run_evaluation(model, "vit", digits(10), [make_attack(name, 8, 2)], tmp_path, sizes=Sizes(4, 4), **SILENT)
    (key,) = [key for key in data["attacks"] if key != "clean"]
    assert data["attacks"][key]["correct"] <= data["attacks"]["clean"]["correct"]
    assert ("batch=4" in key) == name.startswith("pgd-mi")
    attacked = (np.load(tmp_path / data["attacks"][key]["per_image"])["rounds"] == 1).sum()
    assert attacked == (10 if name.startswith("pgd-mi") else data["attacks"]["clean"]["correct"])


def test_attacks_that_are_launched_as_graphs_break_the_same_images(tmp_path, monkeypatch):
    """In batches of 3: the first as it is, whole ones launched, what is left over as it is; or, if asked for, none."""
    model = classifier()
    attacks, tape, found = parse_attacks("fgsm,pgd-5,cw-3,pgd-l2-3", 12, 4, restarts=2), Tape(), []
    monkeypatch.setattr(rounds, "recorder_for", lambda device: tape)
    for launch in (False, True):
        assert not tape.begun
        folder, own = tmp_path / str(launch), {"sizes": Sizes(3, 64), "launch": launch, **SILENT}
        data = run_evaluation(model, "toy", digits(20), attacks, folder, **own)
        found.append([dict(np.load(folder / entry["per_image"])) for entry in data["attacks"].values()])
    assert tape.launched > 5
    for mine, theirs in zip(*found, strict=True):
        for name in ("number", "broken", "rounds", "prediction", "loss"):
            np.testing.assert_array_equal(mine[name], theirs[name], name)


def test_step_graph_off_launches_none(monkeypatch):
    trained = SimpleNamespace(model=None, source="x", notes=[], args={"model": "vit_ti"}, classes=None)
    for name, value in {"load_classifier": trained, "chosen_images": None, "training_eps": None}.items():
        monkeypatch.setattr(configured, name, lambda *_, value=value, **__: value)
    monkeypatch.setattr(configured, "run_evaluation", lambda *_, **how: how["launch"])
    words = {"checkpoint": "x.pth", "device": "cpu"}
    asked = [configured.evaluate(EvaluateConfig().updated(words | {"step_graph": how})) for how in ("auto", "off")]
    assert asked == [True, False]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
def test_attacks_that_are_cuda_graphs_break_the_images_that_eager_ones_break(tmp_path):
    model, found = classifier().cuda(), []
    attacks = parse_attacks("fgsm,pgd-20,cw-20,pgd-l2-20", 12, 4, restarts=2)
    for launch in (True, False):
        folder, own = tmp_path / str(launch), {"sizes": Sizes(8, 64), "launch": launch, **SILENT}
        data = run_evaluation(model, "toy", digits(40), attacks, folder, **own)
        found.append([dict(np.load(folder / entry["per_image"])) for entry in data["attacks"].values()])
    for mine, theirs in zip(*found, strict=True):
        for name in ("number", "broken", "rounds", "prediction"):
            np.testing.assert_array_equal(mine[name], theirs[name], name)
        np.testing.assert_allclose(mine["loss"], theirs["loss"], rtol=1e-4)


def test_a_stronger_attack_leaves_fewer(tmp_path):
    attacks = [make_attack("pgd-10", eps, eps / 4) for eps in (4, 64)]
    data = run_evaluation(classifier(), "toy", digits(60), attacks, tmp_path, **SILENT)
    clean, weak, strong = (entry["accuracy"] for entry in data["attacks"].values())
    assert clean > 0.7
    assert clean >= weak > strong + 0.3
    assert strong < 0.1


def test_models_that_cannot_be_evaluated(tmp_path):
    broken = classifier()
    torch.nn.init.constant_(broken[-1].bias, torch.nan)
    with pytest.raises(CheckpointError, match=r"checkpoint: runs/x.pth answers NaN or infinity"):
        run_evaluation(broken, "runs/x.pth", digits(4), [], tmp_path, **SILENT)
    other = untrained()
    other.num_classes = 7
    with pytest.raises(ValueError, match=r"dataset: the images have 10 classes, the head of x has 7"):
        run_evaluation(other, "x", digits(4), [], tmp_path, **SILENT)
    with pytest.raises(ValueError, match=r"pgd-feature needs a model with features"):
        run_evaluation(classifier(), "x", digits(4), [make_attack("pgd-feature", 8, 2)], tmp_path, **SILENT)
    with pytest.raises(ValueError, match=r"num_images: 100000"):
        run_evaluation(classifier(), "x", Images("digits", "", 32, num_images=100000), [], tmp_path, **SILENT)


def test_the_model_is_left_as_it_is(tmp_path):
    model = classifier().train()
    run_evaluation(model, "toy", digits(4), [make_attack("pgd-2", 8, 2)], tmp_path, **SILENT)
    assert model.training
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


def test_wilson_and_sign_test():
    low, high = wilson(8, 10)
    assert (round(low, 4), round(high, 4)) == (0.4902, 0.9433)
    assert wilson(0, 20)[0] == 0
    assert wilson(20, 20)[1] == 1
    assert wilson(0, 0) == (0, 1)
    assert sign_test(0, 0) == 1
    assert sign_test(5, 0) == 1 / 32
    assert sign_test(1, 1) == 0.75


class Watched(torch.nn.Module):
    """Notes in which precision of fp32 products and convolutions it is called."""

    def __init__(self, model):
        super().__init__()
        self.model, self.seen = model, set()

    def __deepcopy__(self, memo):
        return self

    def forward(self, images):
        self.seen.add((torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32))
        return self.model(images)


def test_tf32_is_off_while_an_evaluation_runs_and_as_before_afterwards(tmp_path, monkeypatch):
    """Planted, each was seen to fail: convolutions in tf32, PyTorch's default; the setting of the caller lost."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        model = Watched(classifier().requires_grad_(False))
        run_evaluation(model, "toy", digits(4), parse_attacks("fgsm", 8, 2), tmp_path, **SILENT)
        assert model.seen == {("highest", False)}
        assert torch.get_float32_matmul_precision() == "high"
        assert torch.backends.cudnn.allow_tf32
    finally:
        torch.set_float32_matmul_precision(before)
