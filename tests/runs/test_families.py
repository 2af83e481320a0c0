"""ConViT, CaiT, Swin and XCiT from pre-training to evaluation, interrupted once on the way."""

import json

import pytest
import torch

from mimir_fast.cli import analyze, evaluate, finetune, pretrain
from tests.support.finetune_runs import make_data
from tests.support.runs import load
from tests.support.small_models import small_models

COMMON = """--dataset imagefolder --patch_size 4 --batch_size 4 --epochs 1 --warmup_epochs 0 --lr 1e-3 --device cpu
--num_workers 0 --precision fp32 --no_compile"""


def words(data, out, *more: str) -> list[str]:
    return [*COMMON.split(), "--data_root", str(data), "--output_dir", str(out), "--log_dir", str(out), *more]


def same(first: dict, second: dict) -> bool:
    return all(torch.equal(first[name], second[name]) for name in first)


# Patches of 8 pixels are the smallest that its stem makes.
PATCHES = {"xcit_small": ("--patch_size", "8")}


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    small_models(monkeypatch.setitem)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "compat"),
    [
        ("convit_ti", "none"),
        ("convit_ti", "original"),
        ("cait_xxs24", "none"),
        ("swin_tiny", "none"),
        ("xcit_small", "original"),
    ],
)
def test_from_pretraining_to_evaluation(tmp_path, name, compat, capsys):
    data = make_data(tmp_path / "data", test_images=44)
    patches = PATCHES.get(name, ())
    side = ("--input_size", "16", "--compat", compat, *patches)
    attacked = f"--model mae_{name} --attack pgd_mae --steps 2 --mi_train hsic --mi_xpl 1e-3".split()
    for out, stop in (("whole", ()), ("halves", ("--max_steps", "1")), ("halves", ("--resume", "auto"))):
        assert pretrain.main(words(data, tmp_path / out, *side, *attacked, *stop)) == 0
    checkpoint = tmp_path / "whole" / "checkpoint-0.pth"
    encoder = load(checkpoint)
    assert same(encoder["model"], load(tmp_path / "halves" / "checkpoint-0.pth")["model"])
    assert vars(encoder["args"])["compat"] == compat
    if name == "convit_ti":
        other = "none" if compat == "original" else "original"
        again = words(data, tmp_path / "halves", "--input_size", "16", *attacked, "--epochs", "2", "--resume", "auto")
        assert pretrain.main([*again, "--compat", other]) == 2
        assert f"compat: the resumed run had --compat {compat}, this one has {other}" in capsys.readouterr().err

    attacked = (
        f"--model {name} --attack_train pgd --steps 1 --layer_decay 0.5 --aa noaug --reprob 0 --drop_path 0.1".split()
    )
    start = ("--finetune", str(checkpoint), "--model_ema", "--input_size", "24", "--compat", compat, *patches)
    for out, stop in (("tuned", ()), ("parts", ("--max_steps", "1")), ("parts", ("--resume", "auto"))):
        assert finetune.main(words(data, tmp_path / out, *start, *attacked, *stop)) == 0
    trained = tmp_path / "tuned" / "checkpoint-0.pth"
    model = load(trained)["model"]
    assert same(model, load(tmp_path / "parts" / "checkpoint-0.pth")["model"])
    if name == "convit_ti":
        # Biases that came with the encoder are trained like all else.
        biases = {key for key in model if key.startswith("blocks.") and key.endswith(("qk.bias", "v.bias", "qkv.bias"))}
        assert len(biases) == (5 if compat == "none" else 0)
        assert all(not torch.equal(model[key], encoder["model"][key]) for key in biases)
    out = (
        "--attacks",
        "clean,pgd-2",
        "--data_root",
        str(data),
        "--device",
        "cpu",
        "--output_dir",
        str(tmp_path / "eval"),
    )
    assert evaluate.main(["--checkpoint", str(trained), *out]) == 0
    for source in (checkpoint, trained):
        few = ("--num_images", "44", "--steps", "1", "--output_dir", str(tmp_path / "seen"))
        assert analyze.main(["--checkpoint", str(source), "--data_root", str(data), "--device", "cpu", *few]) == 0
    results = json.loads((tmp_path / "eval" / "results.json").read_text())
    assert set(results["attacks"]) == {"clean", "pgd-2 eps=8 alpha=2"}
