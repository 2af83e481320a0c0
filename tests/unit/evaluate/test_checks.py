"""Models that only look robust are found out, honest ones are not suspected."""

from pathlib import Path

import numpy as np
import pytest

from mimir_fast.evaluate import Sizes, make_attack, parse_attacks, run_evaluation
from mimir_fast.evaluate.checks import AttackResult, compare, large_eps, vanishing_gradients
from mimir_fast.evaluate.records import ROBUST, Record
from tests.support.classifiers import Loud, Quantised, classifier, digits, one_thread, short_autoattack  # noqa: F401

SILENT = {"say": lambda line: None}


def warned(data: dict) -> set[str]:
    return {finding["check"] for finding in data["checks"] if finding["status"] == "warning"}


def evaluated(model, folder, words: str) -> dict:
    attacks = parse_attacks(words, 24, 6)
    return run_evaluation(model, "toy", digits(60), attacks, folder, sizes=Sizes(64, 64), with_checks=True, **SILENT)


def test_an_honest_model_is_not_suspected(tmp_path, monkeypatch):
    short_autoattack(monkeypatch)
    data = evaluated(classifier(), tmp_path, "fgsm,pgd-5,pgd-20,cw-20,aa")
    assert warned(data) == set()
    assert {finding["check"] for finding in data["checks"]} == {
        "AutoAttack not above PGD", "Square not ahead", "more steps are stronger", "loss rises with steps",
        "PGD stronger than FGSM", "vanishing gradients", "large eps",
    }  # fmt: skip


@pytest.mark.parametrize("mask", [Quantised, Loud])
def test_masked_gradients_are_found_out(tmp_path, monkeypatch, mask):
    short_autoattack(monkeypatch, queries=200)
    said = []
    data = evaluated(mask(classifier()), tmp_path, "pgd-5,aa" if mask is Quantised else "pgd-5")
    expected = {"vanishing gradients", "large eps"} | ({"Square not ahead"} if mask is Quantised else set())
    assert expected <= warned(data)
    run_evaluation(mask(classifier()), "toy", digits(60), [], tmp_path, say=said.append)
    assert sum(line.startswith("warning: ") and "gradient" in line for line in said) >= 2
    assert any("large eps" in line for line in said)  # found earlier, not forgotten


def outcome(name: str, robust, loss=None, eps: float = 8, rounds: int = 1) -> AttackResult:
    record = Record(Path("nowhere.npz"), np.arange(len(robust)))
    record.broken = np.where(robust, ROBUST, rounds).astype(np.int8)
    record.loss = np.full(len(robust), 1.0, np.float32) if loss is None else loss.astype(np.float32)
    return AttackResult(make_attack(name, eps, eps / 4), record)


def statuses(*outcomes: AttackResult) -> dict:
    return {finding.check: finding.status for finding in compare(outcomes)}


def test_comparisons():
    rng = np.random.default_rng(0)
    low, high = np.arange(200) < 100, np.arange(200) < 112
    few = np.arange(200) < 102
    assert statuses(outcome("pgd-20", low), outcome("aa", high))["AutoAttack not above PGD"] == "warning"
    assert statuses(outcome("pgd-20", low), outcome("aa", few))["AutoAttack not above PGD"] == "passed"
    assert statuses(outcome("pgd-20", high), outcome("aa", low))["AutoAttack not above PGD"] == "passed"
    assert statuses(outcome("cw", low), outcome("aa", high))["AutoAttack not above PGD"] == "warning"
    assert statuses(outcome("pgd-20", low), outcome("pgd-100", high))["more steps are stronger"] == "warning"
    assert statuses(outcome("fgsm", low), outcome("pgd-20", high))["PGD stronger than FGSM"] == "warning"
    assert statuses(outcome("pgd-20", low[:20]), outcome("pgd-100", low[:20]))["more steps are stronger"] == "undecided"
    loss = rng.normal(size=200)
    falling = (outcome("pgd-20", low, loss), outcome("pgd-100", low, loss - 0.1 - 0.1 * rng.random(200)))
    assert statuses(*falling)["loss rises with steps"] == "warning"
    noisy = (outcome("pgd-20", low, loss), outcome("pgd-100", low, loss - 0.01 + rng.normal(size=200)))
    assert statuses(*noisy)["loss rises with steps"] == "passed"
    assert statuses(outcome("aa", high, rounds=4))["Square not ahead"] == "warning"
    assert statuses(outcome("aa", high, rounds=2))["Square not ahead"] == "passed"
    assert statuses(outcome("pgd-20", low), outcome("aa", high, eps=4), outcome("pgd-100", high, eps=4)) == {
        "AutoAttack not above PGD": "passed",
        "Square not ahead": "passed",
    }  # fmt: skip  (other radii are not compared)


def test_slices():
    record = outcome("pgd-40", np.arange(100) < 30).record
    assert large_eps(record).status == "warning"
    assert "30 of 100" in large_eps(record).text
    assert large_eps(outcome("pgd-40", np.arange(100) < 2).record).status == "passed"
    assert vanishing_gradients(50, 100).status == "warning"
    assert vanishing_gradients(0, 100).status == "passed"
    assert vanishing_gradients(0, 0).status == "undecided"
