"""A tie to the outside: counts of three small models equal those of torchattacks and of pyautoattack, used directly.

The models are seeds: trained here, in a second each.  AutoAttack is shortened on both sides; at full length, once, the same 24
images were left by both on each model: 8, 9 and 6 of them.
"""

from functools import cache

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mimir_fast.data import eval_batches
from mimir_fast.data.crops import to_float
from mimir_fast.evaluate import Sizes, autoattack, parse_attacks, run_evaluation
from mimir_fast.evaluate.records import ROBUST
from mimir_fast.models import VisionTransformer
from tests.support.classifiers import digits, one_thread, short_autoattack, untrained  # noqa: F401

# Name -> the model, passes over the training images, eps in 1/255.
MODELS = {
    "mlp": (
        lambda: nn.Sequential(nn.AvgPool2d(4), nn.Flatten(), nn.Linear(192, 48), nn.ReLU(), nn.Linear(48, 10)),
        4,
        16,
    ),
    "convolutions": (lambda: untrained(1), 4, 12),
    "vit": (
        lambda: VisionTransformer(img_size=32, patch_size=16, num_classes=10, embed_dim=24, depth=1, num_heads=2),
        8,
        12,
    ),
}
STEPS = (20, 100)


@cache
def trained(name: str) -> nn.Module:
    make, passes, _ = MODELS[name]
    torch.manual_seed(list(MODELS).index(name))
    model = make()
    batches = [(to_float(images), labels) for images, labels in eval_batches("digits", "", 32, 64, split="train")]
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for images, labels in batches * passes:
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()
    return model.eval().requires_grad_(False)


def ours(name: str, words: str, count: int, folder) -> dict[str, np.ndarray]:
    """Which images are robust, by the attack's name."""
    attacks, sizes = parse_attacks(words, MODELS[name][2], MODELS[name][2] / 4), Sizes(count, count)
    data = run_evaluation(trained(name), name, digits(count), attacks, folder, sizes=sizes, say=lambda line: None)
    entries = data["attacks"].values()
    return {entry["settings"]["attack"]: np.load(folder / entry["per_image"])["broken"] == ROBUST for entry in entries}


def batch(name: str, count: int):
    """The model, its radius, the images that `ours` attacks with their labels, and which of them it gets right."""
    chosen = digits(count).choose(lambda line: None)
    images, labels = next(iter(chosen.images.stream(count, chosen.indices)))
    model, images = trained(name), to_float(images)
    return model, MODELS[name][2] / 255, images, labels, model(images).argmax(1) == labels


@pytest.mark.parametrize("name", MODELS)
def test_clean_and_pgd_counts_equal_those_of_torchattacks(tmp_path, name):
    """Planted, each was seen to fail: half the radius; PGD that descends."""
    torchattacks = pytest.importorskip("torchattacks", reason="needs `pip install --no-deps torchattacks`")
    count = 64
    found = ours(name, ",".join(f"pgd-{steps}" for steps in STEPS), count, tmp_path)
    model, eps, images, labels, right = batch(name, count)
    assert found["clean"].sum() == right.sum()
    for steps in STEPS:
        torch.manual_seed(0)
        adv = torchattacks.PGD(model, eps=eps, alpha=eps / 4, steps=steps)(images, labels)
        standing = right & (model(adv).argmax(1) == labels)
        assert 8 < standing.sum() < right.sum() - 8
        assert found[f"pgd-{steps}"].sum() == standing.sum(), steps


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_autoattack_counts_equal_those_of_the_package_itself(tmp_path, monkeypatch, name):
    """Planted, each was seen to fail: APGD on cross-entropy alone; half the radius."""
    short_autoattack(monkeypatch, queries=200, steps=25)
    count = 24
    found = ours(name, "aa", count, tmp_path)["aa"]
    model, eps, images, labels, right = batch(name, count)
    package = autoattack._package()
    direct = package.AutoAttack(model, norm="Linf", eps=eps, version="standard", seed=0)
    with torch.random.fork_rng():
        adv, _ = direct.run_standard_evaluation(images, labels, batch_size=count)
    standing = (model(adv).argmax(1) == labels).sum()
    assert 3 < standing < right.sum() - 3
    assert found.sum() == standing
