"""mimir-fast evaluate as a user meets it."""

import argparse
import json
import os
import runpy
import sys

import pytest
import torch

from mimir_fast.checkpoints.lock import locked
from mimir_fast.checkpoints.trained_models import Trained, training_eps
from mimir_fast.cli import evaluate as command
from mimir_fast.models import create_classifier
from tests.support.classifiers import one_thread  # noqa: F401
from tests.support.runs import make_images

BASE = "--device cpu --num_images 6 --batch_size 4"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    torch.manual_seed(0)
    model = create_classifier("vit_ti", img_size=32, patch_size=16, num_classes=10)
    args = {"model": "vit_ti", "input_size": 32, "patch_size": 16, "nb_classes": 10, "global_pool": True}
    args = argparse.Namespace(**args, use_normalize=False, dataset="digits", eps=4 / 255, alpha=2 / 255)
    path = tmp_path_factory.mktemp("run") / "checkpoint-1.pth"
    torch.save({"model": model.state_dict(), "epoch": 1, "args": args, "optimizer": {}, "scaler": {}}, path)
    return path


def run(*words) -> int:
    return command.main([word for group in words for word in str(group).split()])


def test_defaults_come_from_the_checkpoint(checkpoint, capsys):
    assert run("--checkpoint", checkpoint, BASE, "--attacks clean,fgsm,pgd-2") == 0
    folder = checkpoint.parent / "eval" / "checkpoint-1"
    data = json.loads((folder / "results.json").read_text())
    assert list(data["attacks"]) == ["clean", "fgsm eps=4", "pgd-2 eps=4 alpha=1"]
    assert data["identity"]["images"]["dataset"] == "digits"
    assert data["identity"]["images"]["n"] == 6
    assert str(checkpoint) in data["attacks"]["clean"]["checkpoint"]
    out = capsys.readouterr().out
    assert "pgd-2 eps=4 alpha=1" in out
    assert "95 % interval" in out
    assert "need more images" in out


def test_the_module_runs_and_explains_itself(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["mimir-fast evaluate", "-h"])
    with pytest.raises(SystemExit) as end:
        runpy.run_module("mimir_fast.evaluate", run_name="__main__")
    text = capsys.readouterr().out
    assert end.value.code == 0
    for word in ("--eps FLOAT", "[1/255]", "pgd-mi", "--num_images INT"):
        assert word in text


def test_ctrl_c_says_how_to_go_on(checkpoint, capsys, monkeypatch, tmp_path):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "evaluate", interrupted)
    assert run("--checkpoint", checkpoint, BASE) == 130
    assert "the same command goes on" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--eps 0.031", "eps: got 0.031, expected 0.25 to 255, in 1/255"),
        ("--alpha 0.008", "alpha: got 0.008, expected 0.02 to 255, in 1/255"),
        ("--attacks clean,bim", "attacks: 'bim' is no attack; expected clean, fgsm"),
        ("--attacks ,", "attacks: '' is no attack"),
        ("--num_images -1", "num_images: got -1, expected 0 or more"),
        ("--batch_size 0", "batch_size: got 0, expected 1 or more"),
        ("--dataset mnist", "dataset: got 'mnist', expected one of imagenet, "),
        ("--split test", "split: got 'test', expected one of val, train, held_out"),
        ("--num_images 99999", "num_images: 99999, expected"),
        ("--device cuda", "device: got cuda, no CUDA device"),
    ],
)
def test_wrong_flags(checkpoint, tmp_path, capsys, words, message):
    if words == "--device cuda" and torch.cuda.is_available():
        pytest.skip("there is a CUDA device here")
    assert run("--checkpoint", checkpoint, BASE, "--output_dir", tmp_path, words) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("mimir-fast evaluate: error: ")
    assert message in line


def test_wrong_checkpoints(tmp_path, capsys):
    for words, message in (
        ("", "checkpoint: got none, expected a file or URL"),
        (f"--checkpoint {tmp_path / 'no.pth'}", "no.pth"),
    ):
        assert run(BASE, words) == 2
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert "checkpoint" in line
        assert message in line


def test_folders_and_lists_that_do_not_fit(checkpoint, tmp_path, capsys):
    data = make_images(tmp_path / "data", 4)
    (data / "train").rename(data / "val")
    words = f"--checkpoint {checkpoint} --device cpu --dataset imagefolder --data_root {data} --output_dir {tmp_path}"
    assert run(words) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "2 classes" in line
    assert "has 10" in line
    empty = tmp_path / "list.txt"
    empty.write_text("\n")
    assert run(words, "--image_list", empty) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "image_list" in line
    assert "names no images" in line


@pytest.mark.parametrize(
    ("eps", "std", "expected"),
    [
        (4 / 255, None, 4),
        (None, None, None),
        (4 / 255 / torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1), (0.229, 0.224, 0.225), 4),  # the original's
    ],
)
def test_the_radius_of_the_training(eps, std, expected):
    trained = Trained(torch.nn.Identity(), {"eps": eps, "std": std}, None, "x.pth")
    assert training_eps(trained) == expected


def test_two_evaluations_of_one_folder_are_an_error_that_names_the_first(checkpoint, capsys, tmp_path):
    with locked(tmp_path):
        assert run("--checkpoint", checkpoint, BASE, "--attacks clean --output_dir", tmp_path) == 2
    assert f"is in use by process {os.getpid()} on" in capsys.readouterr().err
