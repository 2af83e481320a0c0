"""Whole runs from a cache: pre-training, fine-tuning and evaluation as from image files; resuming; several processes."""

import json
import shutil

import pytest

from mimir_fast.cli.evaluate import main as evaluate
from mimir_fast.data.cache.format import Options, read_manifest
from tests.support import finetune_runs
from tests.support.pictures import make_cache
from tests.support.runs import finish, lines, load, run, same_state, start

TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
TRAIN, VAL = Options("train", "yuv420", 16, 0, 10), Options("val", "rgb", 0, 16, 10)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return finetune_runs.make_data(tmp_path_factory.mktemp("files"))


@pytest.fixture(scope="module")
def data(files, tmp_path_factory):
    """The caches of both splits."""
    root = tmp_path_factory.mktemp("cache")
    for options in (TRAIN, VAL):
        make_cache(files, root, options)
    return root


@pytest.mark.slow
def test_pretraining_resumes_to_the_last_bit(data, tmp_path, capsys):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert run(data, whole) == 0
    assert f"data cache yuv420, 16, 0 KB an image, in {data / 'train'}" in capsys.readouterr().out
    assert run(data, broken, "--max_steps 2 --data_threads 1") == 0
    assert run(data, broken, f"--resume auto --stage {tmp_path / 'disk'}") == 0
    assert same_state(load(whole / "checkpoint-1.pth"), load(broken / "checkpoint-1.pth"))
    assert load(whole / "checkpoint-1.pth")["mimir_fast"]["cache"] == read_manifest(data / "train").fingerprint


def test_another_cache_is_refused_and_files_are_said(files, data, tmp_path, capsys):
    assert run(data, tmp_path / "out", "--max_steps 2") == 0
    make_cache(files, tmp_path / "other", Options("train", "rgb", 16, 0, 10))
    assert run(tmp_path / "other", tmp_path / "out", "--resume auto") == 2
    error = capsys.readouterr().err
    assert "data_root: the resumed run was trained on another cache than this cache rgb" in error
    assert error.count("\n") == 1
    assert run(files, tmp_path / "out", "--resume auto --max_steps 3") == 0
    assert "the resumed run read a cache" in capsys.readouterr().out


def test_a_damaged_cache_ends_the_run_with_its_last_checkpoint(data, tmp_path, capsys):
    shutil.copytree(data, tmp_path / "data")
    assert run(tmp_path / "data", tmp_path / "out", "--max_steps 2") == 0
    before = load(tmp_path / "out" / "resume-0-2.pth")
    with open(tmp_path / "data" / "train" / "shard-00000.bin", "r+b") as file:
        file.write(bytes(800))
    assert run(tmp_path / "data", tmp_path / "out", "--resume auto") == 1
    assert "shard-00000.bin: image " in capsys.readouterr().err
    assert same_state(before, load(tmp_path / "out" / "resume-0-2.pth"))


def test_fine_tuning_and_evaluation(files, data, tmp_path, monkeypatch):
    finetune_runs.tiny_models(monkeypatch.setitem)
    assert finetune_runs.finetune(data, tmp_path / "out", "--val_attack fgsm --num_workers 2") == 0
    assert len(lines(tmp_path / "out" / "log.txt")) == 2
    words = ["--checkpoint", str(tmp_path / "out" / "checkpoint-1.pth"), "--attacks", "clean,fgsm", "--device", "cpu"]
    for root in (files, data):
        assert evaluate([*words, "--data_root", str(root), "--output_dir", str(tmp_path / root.name)]) == 0
    ours, theirs = (json.loads((tmp_path / root.name / "results.json").read_text()) for root in (data, files))
    for result in (ours, theirs):
        result["identity"]["images"].pop("hash")
        for entry in result["attacks"].values():
            del entry["seconds"], entry["date"]
    assert ours == theirs


@pytest.mark.slow
def test_two_processes_train_as_one(data, tmp_path):
    child = start(data, tmp_path / "two", f"--batch_size 2 --stage {tmp_path / 'disk'}", TORCHRUN)
    out = finish(child)
    assert child.returncode == 0, out
    assert run(data, tmp_path / "one") == 0
    # attack and masks are drawn by each process: the images are the same, the losses alike
    assert lines(tmp_path / "two" / "log.txt")[0]["train_loss"] == pytest.approx(
        lines(tmp_path / "one" / "log.txt")[0]["train_loss"], rel=0.2
    )
