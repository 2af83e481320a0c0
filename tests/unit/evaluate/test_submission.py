"""The file for RobustBench: its fields, in its words."""

import json

import pytest
import torch

from mimir_fast.attacks.named import make_attack
from mimir_fast.checkpoints.trained_models import Trained
from mimir_fast.cli import evaluate
from mimir_fast.evaluate.submission import deviations, write_submissions
from mimir_fast.models import create_classifier
from tests.support.classifiers import one_thread, short_autoattack  # noqa: F401

# Of its leaderboard's files, in their order.
FIELDS = ["link", "name", "authors", "additional_data", "number_forward_passes", "dataset", "venue", "architecture", "eps",
          "clean_acc", "reported", "autoattack_acc"]  # fmt: skip


def test_robustbench_writes_what_a_submission_asks_for(tmp_path, monkeypatch, capsys):
    """From the command line.  Planted, each was seen to fail: accuracies as fractions; the file of every evaluation."""
    short_autoattack(monkeypatch)
    torch.manual_seed(0)
    args = {
        "model": "vit_ti",
        "input_size": 32,
        "patch_size": 16,
        "nb_classes": 10,
        "dataset": "digits",
        "use_edm": True,
    }
    model = create_classifier("vit_ti", img_size=32, patch_size=16, num_classes=10)
    torch.save({"model": model.state_dict(), "args": args}, tmp_path / "best.pth")
    words = f"--checkpoint {tmp_path / 'best.pth'} --device cpu --num_images 12 --aa_batch 12 --eps 8"
    words += f" --output_dir {tmp_path / 'out'}"
    assert evaluate.main([*words.split(), "--attacks", "clean,aa"]) == 0
    assert not (tmp_path / "out" / "model_info").exists()
    capsys.readouterr()
    assert evaluate.main([*words.split(), "--attacks", "robustbench"]) == 0
    path = tmp_path / "out" / "model_info" / "digits" / "Linf" / "best.json"
    found = json.loads(path.read_text())
    assert list(found) == FIELDS
    results = json.loads((tmp_path / "out" / "results.json").read_text())["attacks"]
    assert found["eps"] == "8/255"
    assert found["clean_acc"] == f"{100 * results['clean']['accuracy']:.2f}"
    assert found["autoattack_acc"] == found["reported"] == f"{100 * results['aa eps=8 group=12']['accuracy']:.2f}"
    assert found["additional_data"] is True
    assert found["architecture"] == "vit_ti, patches of 16 pixels"
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("robustbench: ")]
    assert lines[0].startswith(f"robustbench: {path}; fill in link, name, authors, venue, and name it")
    assert lines[1] == "robustbench: digits is none of its data sets (cifar10, cifar100, imagenet)"


def test_the_l2_norm_has_a_file_of_its_own(tmp_path):
    trained = Trained(torch.nn.Identity(), {"model": "vit_ti", "patch_size": 4}, None, "x.pth")
    aa, l2 = make_attack("aa", 8, 2), make_attack("aa-l2", 0.5, 0)
    entries = {"clean": {"settings": {"attack": "clean"}, "accuracy": 0.9}}
    entries |= {a.name: {"settings": a.settings(), "accuracy": 0.12345} for a in (aa, l2)}
    # Of an earlier call, with another seed.
    entries["aa seed=1"] = {"settings": aa.settings(), "accuracy": 1.0}
    data = {"attacks": entries, "identity": {"images": {"dataset": "cifar10", "n": 10_000, "image_list": None}}}
    assert len(write_submissions(data, trained, ["clean", "aa", "aa-l2"], tmp_path, "x")) == 2
    first, second = (json.loads((tmp_path / "model_info/cifar10" / t / "x.json").read_text()) for t in ("Linf", "L2"))
    assert (first["eps"], second["eps"], second["autoattack_acc"]) == ("8/255", "0.5", "12.35")
    assert first["autoattack_acc"] == "12.35"
    assert first["additional_data"] is None


@pytest.mark.parametrize(
    ("dataset", "name", "eps", "n", "image_list", "said"),
    [
        ("cifar10", "aa", 8, 10_000, None, []),
        ("cifar10", "aa-l2", 0.5, 10_000, None, []),
        ("imagenet", "aa", 4, 5_000, "ids.txt", []),
        ("imagenet", "aa", 4, 5_000, None, ["it counts the images of its list; pass it as --image_list"]),
        ("imagenet", "aa", 2, 50_000, None, [
            "its radius on imagenet is 4/255, this one is 2/255",
            "it counts 5,000 images of its list (--image_list), this evaluation 50,000",
        ]),
        ("cifar100", "aa-l2", 0.5, 100, None, [
            "it has no list of L2 on cifar100", "it counts 10,000 images, this evaluation 100",
        ]),
    ],
)  # fmt: skip
def test_what_differs_from_its_evaluation_is_said(dataset, name, eps, n, image_list, said):
    images = {"dataset": dataset, "n": n, "image_list": image_list}
    assert deviations(images, make_attack(name, eps, 0), "L2" if name == "aa-l2" else "Linf") == said
