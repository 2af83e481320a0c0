"""python -m bench train: times from the trainer's rows, whole runs on the CPU, wrong arguments, the simulated GPU."""

import json
import os

import pytest
import torch
from PIL import Image

from bench.__main__ import main
from bench.images import DISTINCT, write_images
from bench.records import peaks_of, percentiles
from bench.train import mfu, times
from tests.support.runs import make_images
from tests.support.simulation import needs_simulated_gpu

SMALL = "--batch_size 4 --input_size 16 --patch_size 8 --warmup 1 --model".split()
ON_CPU = "--device cpu --num_workers 0".split()


def test_times_are_those_of_the_trainers_rows():
    rows = [{"images_per_s": rate, "data_wait": wait} for rate, wait in ((10.0, 0.1), (10.0, 0.1), (5.0, 0.3))]
    found = times(40, rows)
    assert found["images/s"] == pytest.approx(120 / 16)
    assert found["percentiles"] == {"20": 4.0, "80": pytest.approx(6.4)}
    assert found["data wait"] == pytest.approx((0.4 + 0.4 + 2.4) / 16)


def test_percentiles():
    assert percentiles([3.0]) == {"20": 3.0, "80": 3.0}
    assert percentiles([float(n) for n in range(11)][::-1]) == {"20": 2.0, "80": 8.0}


def test_mfu_is_of_the_peak_of_the_arithmetic():
    record = {"peaks": "h100", "model GFLOP per image": 10.0, "config": {"precision": "bf16"}}
    assert mfu(record, 989e12 / 10e9 / 4) == pytest.approx(0.25)
    single = record | {"config": {"precision": "fp32"}}
    torch.set_float32_matmul_precision("high")
    try:
        assert mfu(single, 494.5e12 / 10e9 / 2) == pytest.approx(0.5)
    finally:
        torch.set_float32_matmul_precision("highest")
    assert mfu(single, 67e12 / 10e9 / 2) == pytest.approx(0.5)
    assert mfu(record | {"peaks": None}, 1.0) is None
    names = (("NVIDIA A100-SXM4-80GB", None), ("NVIDIA A100", "h100"), ("NVIDIA RTX 3090", None), ("cpu", "h100"))
    assert [peaks_of(*name) for name in names] == ["a100", "h100", None, None]


@pytest.mark.slow
@pytest.mark.parametrize(("task", "model"), [("pretrain", "mae_vit_nano"), ("finetune", "vit_nano")])
def test_a_whole_run_on_the_cpu(task, model, tmp_path, capsys):
    data, results = make_images(tmp_path / "data"), tmp_path / "train.jsonl"
    words = ["--task", task, *SMALL, model, "--updates", "2", "--data_root", str(data), "--results", str(results)]
    assert main(["train", *words, "--", *ON_CPU, "--accum_iter", "2"]) == 0
    (record,) = map(json.loads, results.read_text().splitlines())
    assert [record[name] for name in ("device", "task", "updates", "warmup", "images")] == ["cpu", task, 2, 1, 26]
    assert record["config"]["data_root"] == "data"
    assert 0 < record["percentiles"]["20"] <= record["percentiles"]["80"]
    assert record["images/s"] > 0 < record["peak GiB"]
    assert 0 < record["data wait"] < 1
    printed = capsys.readouterr().out
    assert "MFU unknown" in printed
    assert f"{model} 16/8, batch 4 x 2, fp32" in printed
    assert "3/3" in printed  # the trainer's own progress


@pytest.mark.parametrize("verb", ["train", "profile"])
def test_a_training_that_ends_early_leaves_no_record(verb, tmp_path, monkeypatch):
    monkeypatch.setattr("mimir_fast.training.loop.Loop.run", lambda self: 1)
    results = ["--results", str(tmp_path / "none")] if verb == "train" else ["--output", str(tmp_path / "none")]
    words = [*SMALL, "mae_vit_nano", "--updates", "2", "--data_root", str(make_images(tmp_path)), *results]
    with pytest.raises(SystemExit, match="the training ended with status 1 after 0 of 3 updates"):
        main([verb, *words, "--", *ON_CPU])
    assert not (tmp_path / "none").exists()


def test_the_trainers_flags_may_not_end_the_run_earlier(tmp_path, capsys):
    words = [*SMALL, "mae_vit_nano", "--data_root", str(make_images(tmp_path)), "--updates", "9"]
    assert main(["train", *words, "--", *ON_CPU, "--epochs", "1", "--warmup_epochs", "0"]) == 2
    assert "updates: 10 are needed (warmup + updates)" in capsys.readouterr().err


def test_synthetic_images_are_many_but_take_little_room(tmp_path):
    folder = write_images(tmp_path / "new", 2 * DISTINCT + 1, width=20, height=12)
    files = sorted(folder.glob("train/*/*.jpg"))
    assert len(files) == 2 * DISTINCT + 1
    assert len({os.stat(file).st_ino for file in files}) == len({file.read_bytes() for file in files}) == DISTINCT
    with Image.open(files[-1]) as image:
        assert (image.format, image.size, image.mode) == ("JPEG", (20, 12), "RGB")


@needs_simulated_gpu
def test_on_a_simulated_gpu_it_runs_through_and_claims_no_times(tmp_path, capfd):
    results = tmp_path / "train.jsonl"
    words = ["--simulate", "h100", *SMALL, "mae_vit_nano", "--updates", "2", "--results", str(results)]
    assert main(["train", *words, "--", "--no_compile", "--num_workers", "0"]) == 0
    (record,) = map(json.loads, results.read_text().splitlines())
    assert [record[name] for name in ("device", "peaks", "images")] == ["simulated-h100", "h100", 16]
    assert {record[name] for name in ("images/s", "percentiles", "mfu", "data wait")} == {None}
    assert 0 < record["peak GiB"] < 1
    assert "a simulated GPU: no times" in capfd.readouterr().out
