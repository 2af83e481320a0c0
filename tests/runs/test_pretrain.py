"""Whole runs: outputs, exact resume, signals, kills, bad numbers, wrong input."""

import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mimir_fast import cli
from mimir_fast.cli.parser import parse_args
from mimir_fast.cli.pretrain import PRETRAIN, main
from mimir_fast.config.resolve import resolve
from mimir_fast.objectives import reconstruction as objective_module
from mimir_fast.training.logs import drop_lines
from mimir_fast.training.pretraining import build_attack
from tests.support.runs import lines, load, make_images, run


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_images(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    """An uninterrupted run of two epochs of six updates."""
    out = tmp_path_factory.mktemp("whole")
    assert run(data, out) == 0
    return out


def scalars(folder) -> dict[str, list[tuple[int, float]]]:
    events = EventAccumulator(str(folder)).Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_logs_have_the_originals_keys_and_axes(whole):
    epochs = lines(whole / "log.txt")
    assert [list(row)[:3] for row in epochs] == [["train_lr", "train_loss", "epoch"]] * 2
    assert [row["epoch"] for row in epochs] == [0, 1]
    own = {"mi", "grad_norm", "images_per_s", "peak_memory_gib", "skipped_penalties", "skipped_steps", "bad_files"}
    assert own < set(epochs[0])
    updates = lines(whole / "metrics.jsonl")
    assert [row["update"] for row in updates] == list(range(1, 13))
    assert [row["x"] for row in updates] == [int(1000 * (e + s / 6)) for e in range(2) for s in range(6)]
    assert updates[0]["lr"] == 0  # the warm-up starts at zero
    assert np.mean([row["lr"] for row in updates[:6]]) == pytest.approx(epochs[0]["train_lr"])
    assert np.mean([row["loss"] for row in updates[:6]]) == pytest.approx(epochs[0]["train_loss"], rel=1e-6)
    assert updates[3]["loss"] == pytest.approx(updates[3]["recon"] + 1e-3 * updates[3]["mi"], rel=1e-5)
    tags = scalars(whole)
    assert {"train_loss", "lr", "mi", "grad_norm", "images_per_s", "peak_memory_gib", "skipped_penalties"} <= set(tags)
    for tag, key in (("train_loss", "loss"), ("lr", "lr"), ("mi", "mi")):
        assert tags[tag] == [(row["x"], pytest.approx(row[key], rel=1e-6)) for row in updates]


def test_checkpoint_cadence_and_contents(data, tmp_path):
    assert run(data, tmp_path, "--epochs 22 --batch_size 13 --warmup_epochs 2 --max_steps 0 --patch_size 8") == 0
    assert sorted(p.name for p in tmp_path.glob("*.pth")) == [
        "checkpoint-0.pth",
        "checkpoint-20.pth",
        "checkpoint-21.pth",
    ]
    state = load(tmp_path / "checkpoint-21.pth")
    assert state["epoch"] == 21
    assert (state["args"].eps, state["args"].batch_size, state["args"].lr) == (8 / 255, 13, 1e-3)
    samples = np.load(tmp_path / "samples.npz")
    assert samples["clean"].shape == samples["adv"].shape == samples["recon"].shape == (8, 3, 16, 16)
    assert samples["mask"].shape == (8, 4)
    assert 0 < np.abs(samples["clean"] - samples["adv"]).max() <= 8 / 255 + 1e-6
    assert "batch_size: 13" in (tmp_path / "config.yaml").read_text()


def test_derived_learning_rate(data, tmp_path):
    words = "--blr 1e-2 --accum_iter 2 --warmup_epochs 0 --max_steps 1 --epochs 1".split()
    base = [
        "--model",
        "mae_vit_nano",
        "--input_size",
        "16",
        "--patch_size",
        "8",
        "--dataset",
        "imagefolder",
        "--device",
        "cpu",
    ]
    places = [
        "--data_root",
        str(data),
        "--output_dir",
        str(tmp_path),
        "--log_dir",
        "",
        "--batch_size",
        "4",
        "--num_workers=0",
    ]
    assert main([*base, *places, *words]) == 0
    assert lines(tmp_path / "metrics.jsonl")[0]["lr"] == pytest.approx(1e-2 * 4 * 2 / 256)
    assert lines(tmp_path / "metrics.jsonl")[0]["mi"] is None  # attack plain: no penalty


def test_diverging_run_ends_with_status_1_and_its_state(data, tmp_path, capsys):
    assert run(data, tmp_path, "--lr 1e30 --warmup_epochs 0 --max_bad_steps 3 --log_every 1 --epochs 9") == 1
    out = capsys.readouterr().out
    assert "max_bad_steps" in out
    (failed,) = tmp_path.glob("failed-*.pth")
    state = load(failed)
    assert state["batch"]["images"].dtype == torch.uint8
    assert state["mimir_fast"]["counters"][2] == 3
    rows = lines(tmp_path / "metrics.jsonl")
    assert rows[-1]["skipped_steps"] == 3
    assert rows[-1]["loss"] is None
    good = [row for row in rows if row["loss"] is not None]
    assert len(good) == len(rows) - 3


def test_skipped_penalties_are_counted(data, tmp_path, monkeypatch):
    real = objective_module.penalty_value
    calls = []

    def sometimes_nan(*args):
        calls.append(0)
        return real(*args) * (torch.nan if len(calls) in (2, 3) else 1)

    monkeypatch.setattr(objective_module, "penalty_value", sometimes_nan)
    assert run(data, tmp_path, "--epochs 1 --warmup_epochs 0") == 0
    rows = lines(tmp_path / "metrics.jsonl")
    assert [row["skipped_penalties"] for row in rows] == [0, 1, 2, 2, 2, 2]
    assert [row["mi"] is None for row in rows] == [False, True, True, False, False, False]
    assert rows[-1]["skipped_steps"] == 0
    assert lines(tmp_path / "log.txt")[0]["skipped_penalties"] == 2
    assert all(row["loss"] is not None for row in rows)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_runs(data, tmp_path, precision):
    assert run(data, tmp_path, f"--precision {precision} --max_steps 2 --batch_size 2") == 0
    state = load(tmp_path / "resume-0-2.pth")
    assert state["scaler"]["scale"] == 65536.0
    assert all(v.dtype == torch.float32 for v in state["model"].values())
    assert all(row["skipped_steps"] == 0 for row in lines(tmp_path / "metrics.jsonl"))


def test_no_output_folder_writes_nothing(data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ["--output_dir", "", "--log_dir", "", "--max_steps", "1", "--data_root", str(data), "--batch_size", "4"]
    tiny = (
        "--model mae_vit_nano --input_size 16 --patch_size 8 --dataset imagefolder --device cpu --num_workers 0".split()
    )
    assert main([*tiny, *words]) == 0
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        ("--data_root nowhere", ["nowhere"]),
        ("--model mae_vit_huge", ["model", "mae_vit_huge", "mae_vit_ti"]),
        ("--batch_size 400", ["batch_size", "26"]),
        ("--accum_iter 7", ["accum_iter", "7"]),
        ("--eps 0.03", ["eps", "1/255"]),
        ("--dataset caltech", ["dataset", "caltech"]),
    ],
)
def test_wrong_input_is_one_line_and_status_2(data, tmp_path, capsys, extra, words):
    assert run(data, tmp_path, extra) == 2
    err = capsys.readouterr().err.strip().splitlines()
    assert len(err) == 1
    assert all(word in err[0] for word in words), err
    assert not list(tmp_path.glob("*.pth"))


def test_device_default_falls_back_aloud_and_explicit_cuda_is_refused(data, tmp_path, capsys):
    if torch.cuda.is_available():
        pytest.skip("needs a machine without CUDA")
    assert run(data, tmp_path, "--device cuda") == 2
    assert "--device cpu" in capsys.readouterr().err
    words = (
        "--model mae_vit_nano --input_size 16 --patch_size 8 --dataset imagefolder --batch_size 4 --num_workers 0".split()
    )
    assert (
        main([*words, "--max_steps", "1", "--data_root", str(data), "--output_dir", str(tmp_path), "--log_dir", ""])
        == 0
    )
    assert "no CUDA device" in capsys.readouterr().out


def test_misspelt_penalty_is_an_error_unless_the_original_decides(data, tmp_path, capsys):
    assert run(data, tmp_path, "--mi_train hisc --max_steps 1") == 2
    assert "did you mean hsic?" in capsys.readouterr().err
    assert run(data, tmp_path, "--mi_train hisc --max_steps 1 --compat original") == 0
    out = capsys.readouterr().out
    assert "hisc" in out
    assert "NO penalty" in out


def test_drop_lines_survives_a_cut_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"update": 1}\n{"update": 2}\n{"update": 3}\n{"upd')
    drop_lines(path, "update", 2)
    assert lines(path) == [{"update": 1}, {"update": 2}]


def test_command_line_verbs(capsys):
    assert cli.main(["-h"]) == 0
    assert "pretrain" in capsys.readouterr().out
    assert cli.main(["pretrian"]) == 2
    assert "pretrian" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stop:
        cli.main(["pretrain", "-h"])
    assert stop.value.code == 0
    assert "--mi_xpl" in capsys.readouterr().out


def test_fp16_attack_is_scaled_and_normalised_bounds_are_per_channel(data):
    stream = SimpleNamespace(mean=(0.4, 0.5, 0.6), std=(0.2, 0.25, 0.5))
    config, _ = parse_args(
        PRETRAIN, ["--attack", "pgd_mae", "--precision", "fp16", "--use_normalize", "--attack_mask_ratio", "0.5"]
    )
    attack = build_attack(resolve(config, set()), stream, torch.device("cpu"))
    assert (attack.loss_scale, attack.mask_ratio, attack.steps) == (65536.0, 0.5, 1)
    expected = [
        [8 / 255 / s for s in stream.std],
        [10 / 255 / s for s in stream.std],
        [-2.0, -2.0, -1.2],
        [3.0, 2.0, 0.8],
    ]
    assert torch.allclose(attack.bounds, torch.tensor(expected))
    config, _ = parse_args(PRETRAIN, ["--attack", "pgd_mae", "--precision", "bf16"])
    assert build_attack(resolve(config, set()), stream, torch.device("cpu")).loss_scale == 1.0


def test_corrupt_image_is_counted_and_two_are_too_many(data, tmp_path, capsys):
    folder = make_images(tmp_path / "images")
    first, second = sorted((folder / "train" / "class0").iterdir())[:2]
    first.write_bytes(first.read_bytes()[:60])
    assert run(folder, tmp_path / "out", "--epochs 1 --warmup_epochs 0") == 0
    assert lines(tmp_path / "out" / "log.txt")[0]["bad_files"] == 1
    second.write_text("not an image")
    assert run(folder, tmp_path / "out2", "--epochs 1 --warmup_epochs 0") == 1
    err = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert len(err) == 1
    assert "2 of 26" in err[0]


def test_generated_images_are_mixed_in(tmp_path):
    rng = np.random.default_rng(0)
    for i in range(8):
        path = tmp_path / "cifar10" / "train" / f"class{i % 2}" / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(path)
    np.savez(tmp_path / "edm.npz", image=rng.integers(0, 256, (9, 32, 32, 3), dtype=np.uint8), label=np.arange(9) % 2)
    extra = "--input_size 32 --patch_size 8 --dataset cifar10 --use_edm --epochs 1 --warmup_epochs 0"
    assert run(tmp_path, tmp_path / "o", f"{extra} --aux_data_filename {tmp_path / 'edm.npz'}") == 0
    state = load(tmp_path / "o" / "checkpoint-0.pth")
    assert state["args"].dataset == "cifar10s"
    assert state["mimir_fast"]["update"] == 2  # ceil(8 real images / 4)


def test_wandb_gets_the_same_scalars(data, tmp_path, monkeypatch):
    logged, ended = [], []
    session = SimpleNamespace(log=lambda row, step: logged.append((step, row)), finish=lambda: ended.append(1))
    fake = SimpleNamespace(init=lambda **words: session)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    assert run(data, tmp_path, "--wandb --max_steps 3 --warmup_epochs 0") == 0
    rows = lines(tmp_path / "metrics.jsonl")
    assert logged == [(row["update"], row) for row in rows]
    assert ended == [1]


def test_wandb_without_the_package_says_what_to_install(data, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert run(data, tmp_path, "--wandb") == 2
    assert "pip install 'mimir-fast[wandb]'" in capsys.readouterr().err


def test_unwritable_output_folder_is_one_line(data, tmp_path, capsys):
    (tmp_path / "file").write_text("x")
    assert run(data, tmp_path / "file" / "out") == 2
    assert "file" in capsys.readouterr().err


def test_digits_demo_recipe_and_its_report(tmp_path, capsys):
    places = ["--output_dir", str(tmp_path), "--log_dir", str(tmp_path)]
    assert cli.main(["pretrain", "--recipe", "digits_demo", "--max_steps", "2", "--batch_size", "8", *places]) == 0
    assert cli.main(["report", str(tmp_path)]) == 0
    assert (tmp_path / "report.html").stat().st_size > 50_000
