"""Evaluations are stopped, go on, and add up: nothing is lost, nothing is done twice, nothing is mixed up."""

import json
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from mimir_fast.checkpoints.errors import CheckpointError
from mimir_fast.evaluate import Images, Sizes, make_attack, parse_attacks, run_evaluation
from mimir_fast.evaluate.entries import key_of, settings_of
from mimir_fast.evaluate.records import ROBUST, Record
from tests.support.classifiers import Interrupted, classifier, digits, one_thread, short_autoattack, untrained  # noqa: F401

SILENT = {"say": lambda line: None}


def outcomes(folder, data) -> dict:
    return {key: dict(np.load(folder / entry["per_image"])) for key, entry in data["attacks"].items()}


def same(first: dict, second: dict) -> bool:
    return first.keys() == second.keys() and all(
        np.array_equal(first[key][name], second[key][name], equal_nan=name == "loss")
        for key in first
        for name in Record.ARRAYS
    )


@pytest.mark.parametrize("words", ["pgd-3,cw-2", "aa"])
def test_a_stopped_evaluation_goes_on_with_the_same_result(tmp_path, monkeypatch, words):
    short_autoattack(monkeypatch) if words == "aa" else None
    attacks, sizes = parse_attacks(words, 12, 4, restarts=2), Sizes(4, 3)
    model, whole = classifier(), Interrupted(classifier())
    expected = run_evaluation(whole, "toy", digits(10), attacks, tmp_path / "whole", sizes=sizes, **SILENT)
    total, passes, stops = whole.calls[0], 0, 0
    while True:
        limited = Interrupted(model, after=total // 3)
        try:
            found = run_evaluation(limited, "toy", digits(10), attacks, tmp_path / "parts", sizes=sizes, **SILENT)
            break
        except KeyboardInterrupt:
            stops += 1
            assert stops < 20
        finally:
            passes += limited.calls[0]
    assert stops >= 2
    assert passes < 2 * total
    assert same(outcomes(tmp_path / "whole", expected), outcomes(tmp_path / "parts", found))
    assert [e["correct"] for e in expected["attacks"].values()] == [e["correct"] for e in found["attacks"].values()]


def test_attacks_are_added_and_not_repeated(tmp_path):
    first = run_evaluation(classifier(), "toy", digits(10), [make_attack("pgd-2", 8, 2)], tmp_path, **SILENT)
    before = first["attacks"]["pgd-2 eps=8 alpha=2"]
    model = Interrupted(classifier())
    model.num_classes = 10
    run_evaluation(model.model, "toy", digits(10), parse_attacks("pgd-2,fgsm", 4, 1), tmp_path, **SILENT)
    run_evaluation(model.model, "toy", digits(10), [make_attack("pgd-2", 8, 2)], tmp_path, seed=3, **SILENT)
    data = json.loads((tmp_path / "results.json").read_text())
    assert list(data["attacks"]) == [
        "clean", "pgd-2 eps=8 alpha=2", "pgd-2 eps=4 alpha=1", "fgsm eps=4", "pgd-2 eps=8 alpha=2 seed=3"
    ]  # fmt: skip
    assert data["attacks"]["pgd-2 eps=8 alpha=2"] == before
    entry = data["attacks"]["pgd-2 eps=4 alpha=1"]
    assert entry["n"] == 10
    assert entry["interval95"][0] <= entry["accuracy"] <= entry["interval95"][1]
    assert entry["settings"] == {
        "attack": "pgd-2", "steps": 2, "eps": 4, "alpha": 1, "restarts": 1, "seed": 0
    }  # fmt: skip
    assert entry["versions"].keys() == {"mimir-fast", "torch", "python"}
    assert entry["date"]
    assert entry["device"]


def test_a_finished_attack_costs_nothing_again(tmp_path):
    calls = []
    for _ in range(2):
        model = Interrupted(classifier())
        run_evaluation(model, "toy", digits(10), [make_attack("pgd-30", 8, 2)], tmp_path, **SILENT)
        calls.append(model.calls[0])
    assert calls[0] > 30
    assert calls[1] <= 1


def test_results_of_another_model_or_other_images_are_set_aside_and_come_back(tmp_path):
    lines = []
    first = run_evaluation(classifier(), "a", digits(10), [make_attack("fgsm", 8, 2)], tmp_path, say=lines.append)
    assert not any("set_aside" in line for line in lines)
    other = run_evaluation(untrained(1), "b", digits(10), [], tmp_path, say=lines.append)
    assert list(other["attacks"]) == ["clean"]
    assert any("another model or other images" in line for line in lines)
    fewer = run_evaluation(classifier(), "a", digits(9), [], tmp_path, **SILENT)
    assert fewer["attacks"]["clean"]["n"] == 9
    assert len(list((tmp_path / "set_aside").iterdir())) == 2
    again = run_evaluation(classifier(), "a", digits(10), [make_attack("pgd-2", 8, 2)], tmp_path, **SILENT)
    assert list(again["attacks"]) == ["clean", "fgsm eps=8", "pgd-2 eps=8 alpha=2"]
    assert again["attacks"]["fgsm eps=8"] == first["attacks"]["fgsm eps=8"]


def test_outcomes_of_an_unknown_model_are_not_taken_for_this_ones(tmp_path):
    run_evaluation(classifier(), "a", digits(5), [], tmp_path, **SILENT)
    (tmp_path / "results.json").unlink()
    with pytest.raises(CheckpointError, match=r"output_dir: .*per_image is there without the results.json"):
        run_evaluation(untrained(1), "b", digits(5), [], tmp_path, **SILENT)


def test_lists_that_begin_alike_are_different_images(tmp_path):
    (tmp_path / "val" / "a").mkdir(parents=True)
    for number in range(3):
        Image.new("RGB", (16, 16), (80 * number, 0, 0)).save(tmp_path / "val" / "a" / f"{number}.png")
    prints = set()
    for second in (1, 2):
        (tmp_path / "list.txt").write_text(f"a/0.png\na/{second}.png\n")
        images = Images("imagefolder", str(tmp_path), 16, image_list=str(tmp_path / "list.txt"))
        prints.add(images.choose().fingerprint)
    assert len(prints) == 2


def test_results_are_not_those_of_images_that_were_replaced_since(tmp_path):
    """Any image, not the first alone; files that were only copied again are the same images."""
    folder = tmp_path / "val" / "a"
    for name in ("a", "b"):
        (tmp_path / "val" / name).mkdir(parents=True)
        for number in range(3):
            Image.new("RGB", (16, 16), (80 * number, 0, 0)).save(tmp_path / "val" / name / f"{number}.png")
    images = Images("imagefolder", str(tmp_path), 16)
    before = images.choose().fingerprint
    (folder / "2.png").touch()
    assert images.choose().fingerprint == before
    Image.new("RGB", (16, 16), (80, 1, 0)).save(folder / "1.png")
    assert images.choose().fingerprint != before
    assert replace(images, eval_resize="none").choose().fingerprint != images.choose().fingerprint


def test_long_seeds_have_results_of_their_own():
    attack = make_attack("pgd-2", 8, 2)
    keys = [key_of(settings_of(attack, Sizes(64, 64), seed)) for seed in (1234567, 1234568)]
    assert keys == [f"pgd-2 eps=8 alpha=2 seed={seed}" for seed in (1234567, 1234568)]


def test_rounds_pass_on_what_they_leave():
    record = Record("nowhere.npz", np.arange(5), np.array([1, 1, 1, 1, 0], bool))
    assert record.left(1).tolist() == [0, 1, 2, 3]
    assert record.left(1, everything=True).tolist() == [0, 1, 2, 3, 4]
    wrong, right, losses = np.array([1, 0]), np.array([0, 0]), np.array([2.0, 1.0], np.float32)
    record.note(np.array([0, 1]), 1, right, wrong, losses)
    assert record.broken.tolist() == [1, ROBUST, ROBUST, ROBUST, 0]
    assert record.left(1).tolist() == [2, 3]  # groups of the round stay what they were
    record.note(np.array([2, 3]), 1, right, right, losses)
    assert record.left(1).tolist() == []
    assert record.left(2).tolist() == [1, 2, 3]
    record.note(np.array([1, 2]), 2, right, wrong, np.array([0.5, np.nan], np.float32))
    assert record.broken.tolist() == [1, 2, ROBUST, ROBUST, 0]
    assert record.loss[:3].tolist() == [2.0, 1.0, 2.0]


def test_the_first_round_that_breaks_an_image_is_the_one_that_counts():
    record = Record("nowhere.npz", np.arange(2), np.array([True, False]))
    for turn in (1, 2):
        record.note(np.array([0, 1]), turn, np.array([3, 3]), np.array([5, 5]), np.ones(2, np.float32))
    assert record.broken.tolist() == [1, 0]


def test_an_image_that_was_wrong_unattacked_stays_wrong():
    record = Record("nowhere.npz", np.arange(1), np.array([False]))
    record.note(np.array([0]), 1, np.array([3]), np.array([3]), np.array([0.1], np.float32))
    assert not record.correct[0]


def test_damaged_files_are_named(tmp_path):
    run_evaluation(classifier(), "toy", digits(5), [], tmp_path, **SILENT)
    path = tmp_path / "per_image" / "clean.npz"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(CheckpointError, match=r"output_dir: .*clean.npz is damaged"):
        run_evaluation(classifier(), "toy", digits(5), [], tmp_path, **SILENT)
    (tmp_path / "results.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"output_dir: .*results.json is no results file of ours"):
        run_evaluation(classifier(), "toy", digits(5), [], tmp_path, **SILENT)
