"""A further family of models, which only its record and the list of families name, from pre-training to evaluation."""

import json

import pytest

from mimir_fast.cli import evaluate, finetune, pretrain
from mimir_fast.models import families
from mimir_fast.models.families.vit import VIT
from tests.support.finetune_runs import make_data
from tests.support.runs import load
from tests.support.toy_family import TOY

COMMON = """--dataset imagefolder --patch_size 4 --batch_size 4 --epochs 1 --warmup_epochs 0 --lr 1e-2 --device cpu
--num_workers 0 --precision fp32 --no_compile"""


@pytest.fixture(autouse=True)
def two_families(monkeypatch):
    monkeypatch.setattr(families, "FAMILIES", (VIT, TOY))


def test_from_pretraining_to_evaluation(tmp_path):
    data = make_data(tmp_path / "data")
    places = ["--data_root", str(data), "--output_dir"]
    words = [*COMMON.split(), *places, str(tmp_path / "pre"), "--log_dir", str(tmp_path / "pre"), "--input_size", "16"]
    attacked = "--model mae_toy_small --attack pgd_mae --steps 2 --mi_train hsic --mi_xpl 1e-3".split()
    assert pretrain.main([*words, *attacked]) == 0
    checkpoint = tmp_path / "pre" / "checkpoint-0.pth"
    assert "encoder.layers.1.norm.weight" in load(checkpoint)["model"]

    out = tmp_path / "fine"
    words = [
        *COMMON.split(),
        *places,
        str(out),
        "--log_dir",
        str(out),
        "--input_size",
        "24",
        "--finetune",
        str(checkpoint),
    ]
    attacked = "--model toy_small --attack_train pgd --steps 1 --layer_decay 0.5 --aa noaug --reprob 0".split()
    assert finetune.main([*words, *attacked]) == 0
    trained = out / "checkpoint-0.pth"
    groups = load(trained)["optimizer"]["param_groups"]
    assert sorted({group["lr_scale"] for group in groups}) == [0.125, 0.25, 0.5, 1.0]

    attacks = [
        "--attacks",
        "clean,pgd-2",
        "--data_root",
        str(data),
        "--device",
        "cpu",
        "--output_dir",
        str(tmp_path / "eval"),
    ]
    assert evaluate.main(["--checkpoint", str(trained), *attacks]) == 0
    results = json.loads((tmp_path / "eval" / "results.json").read_text())
    assert set(results["attacks"]) == {"clean", "pgd-2 eps=8 alpha=2"}
