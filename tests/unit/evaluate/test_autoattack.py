"""AutoAttack on the package pyautoattack, and what its absence means."""

import sys

import numpy as np
import pytest
import torch

from mimir_fast.data.crops import to_float
from mimir_fast.evaluate import Sizes, make_attack, parse_attacks, run_evaluation
from mimir_fast.evaluate.autoattack import SUB_ATTACKS, AutoAttack, InParts
from mimir_fast.evaluate.records import ROBUST
from tests.support.classifiers import classifier, digits, one_thread, short_autoattack, untrained  # noqa: F401

CPU = torch.device("cpu")
SILENT = {"say": lambda line: None}


def test_in_parts_is_the_same_model():
    model, images = classifier().double(), torch.rand(7, 3, 32, 32).double()
    results = []
    for module in (model, InParts(model, 3), InParts(model, 7)):
        leaf = images.clone().requires_grad_()
        logits = module(leaf)
        (grad,) = torch.autograd.grad(logits.square().sum(), leaf)
        results.append((logits, grad))
        with torch.no_grad():
            torch.testing.assert_close(module(images), results[0][0])
    for other in results[1:]:
        torch.testing.assert_close(other, results[0])


def test_standard_and_the_batch_size(tmp_path, monkeypatch):
    short_autoattack(monkeypatch)
    runs, model, torch_state = [], classifier(), torch.get_rng_state()
    for size in (3, 8):
        folder = tmp_path / str(size)
        attack = make_attack("aa", 16, 4)
        data = run_evaluation(model, "toy", digits(12), [attack], folder, sizes=Sizes(size, 8), **SILENT)
        entry = data["attacks"]["aa eps=16 group=8"]
        runs.append(np.load(folder / entry["per_image"])["broken"])
        assert list(entry["after"]) == list(SUB_ATTACKS)
        assert entry["after"]["square"] == entry["accuracy"]
        assert entry["after"]["apgd-ce"] >= entry["after"]["apgd-t"] >= entry["after"]["fab-t"] >= entry["accuracy"]
        assert "pyautoattack" in entry["versions"]["autoattack"]
    assert torch.equal(torch_state, torch.get_rng_state())
    assert np.array_equal(*runs)
    assert 0 < (runs[0] == ROBUST).sum() < 12


def test_every_part_attacks(monkeypatch):
    short_autoattack(monkeypatch, queries=100)
    images, _ = next(iter(digits(12).stream(12)))
    images, numbers = to_float(images), torch.arange(12)
    model = classifier().requires_grad_(False)
    labels = model(images).argmax(1)
    ensemble = AutoAttack(model, 10, 40.0, 0, CPU, 12)
    for name in SUB_ATTACKS:
        adv = ensemble.run(name, images, labels, numbers)
        broken = (model(adv).argmax(1) != labels).float().mean()
        assert broken > 0.25, name
        assert (adv - images).abs().max() <= 40 / 255 + 1e-6
        assert adv.min() >= 0
        assert adv.max() <= 1
        assert torch.equal(adv, ensemble.run(name, images, labels, numbers)), name
    other = ensemble.run("square", images, labels, numbers + 1)
    assert not torch.equal(other, adv)  # its seed follows the image's number


def test_both_norms_beside_each_other(tmp_path, monkeypatch):
    """Planted, each was seen to fail: the ensemble in the L-infinity norm; its radius in 1/255; checks across norms."""
    short_autoattack(monkeypatch)
    attacks = parse_attacks("pgd-l2-20,aa-l2,pgd-3,aa", 8, 2, eps_l2=2.0)
    lines = []
    data = run_evaluation(classifier(), "toy", digits(16), attacks, tmp_path, sizes=Sizes(8, 16), say=lines.append)
    keys = ["clean", "pgd-l2-20 eps=2 alpha=0.5", "aa-l2 eps=2 group=16", "pgd-3 eps=8 alpha=2", "aa eps=8 group=16"]
    assert list(data["attacks"]) == keys
    _, ours, ensemble, *_ = (entry["correct"] for entry in data["attacks"].values())
    assert 0 < ensemble <= ours < data["attacks"]["clean"]["correct"]
    compared = [finding["text"] for finding in data["checks"] if finding["check"] == "AutoAttack not above PGD"]
    assert [("pgd-l2-20" in text, "eps 2)" in text, "eps 8/255)" in text) for text in compared] == [
        (False, False, True), (True, True, False)
    ]  # fmt: skip
    assert any("of -l2 the norm" in line for line in lines)


def test_one_image_alone(monkeypatch):
    short_autoattack(monkeypatch)
    model, images, labels = untrained().requires_grad_(False), torch.rand(1, 3, 32, 32), torch.tensor([0])
    labels = model(images).argmax(1)
    ensemble = AutoAttack(model, 10, 0.3, 0, CPU, 4)
    for name in SUB_ATTACKS:
        assert ensemble.run(name, images, labels, torch.tensor([0])).shape == images.shape


def test_few_classes(monkeypatch):
    short_autoattack(monkeypatch)
    assert AutoAttack(untrained(), 6, 8, 0, CPU, 4).attacks.apgd_targeted.n_target_classes == 5
    with pytest.raises(ValueError, match=r"attacks: aa needs 4 classes or more .* the model has 3"):
        AutoAttack(untrained(), 3, 8, 0, CPU, 4)


def test_absent_package(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyautoattack", None)
    with pytest.raises(
        ValueError, match=r"attacks: aa needs the package pyautoattack: pip install 'mimir-fast\[eval\]'"
    ):
        run_evaluation(classifier(), "toy", digits(5), [make_attack("aa", 8, 2)], tmp_path, **SILENT)
    assert not (tmp_path / "results.json").exists()  # said before any work
