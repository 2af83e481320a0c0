"""Whole runs from a cache: pre-training, fine-tuning and evaluation as from image files; resuming; several processes."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys

import pytest

from mimir_fast.cli.evaluate import main as evaluate
from mimir_fast.data import datasets
from mimir_fast.data.cache.format import Options, read_manifest
from mimir_fast.data.cache.shards import open_cache
from mimir_fast.data.cache.staging import staged
from tests.support import finetune_runs
from tests.support.pictures import make_cache
from tests.support.runs import finish, lines, load, run, same_state, start
from tests.support.simulation import needs_simulated_gpu, run_simulated

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


def test_a_disk_that_fails_twice_ends_the_run_with_its_last_checkpoint(data, tmp_path, capsys, monkeypatch):
    assert run(data, tmp_path, "--max_steps 2") == 0
    before = load(tmp_path / "resume-0-2.pth")

    def failing(*arguments):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "preadv", failing)
    assert run(data, tmp_path, "--resume auto") == 1
    error = capsys.readouterr().err
    assert f"{data / 'train' / 'shard-'}" in error
    assert f"cannot be read, opened again neither ({os.strerror(errno.EIO)})" in error
    assert same_state(before, load(tmp_path / "resume-0-2.pth"))
    assert not (tmp_path / "checkpoint-0.pth").exists()


def test_fine_tuning_and_evaluation(files, data, tmp_path, monkeypatch):
    """Staged: both caches are read from the copy.  Planted: validation reads data_root."""
    finetune_runs.small_models(monkeypatch.setitem)
    read = []
    with monkeypatch.context() as patch:
        patch.setattr(datasets, "open_cache", lambda folder: read.append(folder) or open_cache(folder))
        words = f"--val_attack fgsm --num_workers 2 --stage {tmp_path / 'disk'}"
        assert finetune_runs.finetune(data, tmp_path / "out", words) == 0
    assert read == [tmp_path / "disk" / "train", tmp_path / "disk" / "val"]
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
@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_signals_save_and_end_a_run(data, tmp_path, number, status):
    child = start(data, tmp_path, "--epochs 1000 --log_every 1")
    seen = ""
    while "step/s" not in seen and "s/step" not in seen:
        seen = child.stdout.readline()
        assert seen, "ended early"
    os.kill(child.pid, number)
    out = finish(child, 60)
    assert child.returncode == status, out
    saved = [path for path in tmp_path.glob("*.pth") if path.name != "checkpoint-0.pth"]
    assert max(load(path)["mimir_fast"]["update"] for path in saved) == lines(tmp_path / "metrics.jsonl")[-1]["update"]


STAGING = """
import sys, time
from pathlib import Path
from mimir_fast.data.cache import staging
blocks = staging._blocks
def slowly(*arguments):
    for block in blocks(*arguments):
        yield block
        print("copying", flush=True)
        time.sleep(0.2)
staging._blocks = slowly
staging.staged(sys.argv[1], Path(sys.argv[2]), "train")
"""


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_staging_that_was_killed_is_begun_again(data, tmp_path, number):
    """At once: the lock of a dead process of this machine is nobody's."""
    words = [sys.executable, "-c", STAGING, str(data), str(tmp_path)]
    child = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True)
    assert child.stdout.readline() == "copying\n"
    os.kill(child.pid, number)
    finish(child, 60)
    assert child.returncode != 0
    assert not (tmp_path / "train" / "manifest.json").exists()
    staged(data, tmp_path, "train")
    assert sorted(path.name for path in (tmp_path / "train").iterdir()) == sorted(
        path.name for path in (data / "train").iterdir()
    )


ON_A_GPU = """
import sys
import torch
from bench.simulated_gpu import marker
from mimir_fast.data import build_pretrain_data, prefetch

mark, device, images = marker(), torch.device("cuda"), torch.empty(4, 3, 16, 16, device="cuda")
stream = build_pretrain_data("imagefolder", sys.argv[1], 16, 4, pin_memory=True)
steps = 0
for epoch in range(4):
    for crops, labels in prefetch(stream.epoch(epoch), device, lambda shape: images):
        steps += 1
        # after the first batches, with which kernels are loaded and pages locked
        if steps == 4:
            torch.cuda.set_sync_debug_mode("error")
            mark("steps")
        assert crops is images
        assert labels.shape == (4,) and labels.is_cuda
mark("end")
buffers = stream._loader.reader.buffers
print("steps", steps, "pinned", all(b.pin_memory for b in buffers), "watched", all(b.copied is not None for b in buffers))
"""


@needs_simulated_gpu
def test_twenty_steps_wait_for_nothing_and_copy_once_a_batch(data, tmp_path):
    (tmp_path / "program.py").write_text(ON_A_GPU)
    printed = run_simulated([sys.executable, tmp_path / "program.py", data], tmp_path / "log")
    assert printed.strip() == "steps 24 pinned True watched True"
    log = [line.split("|") for line in (tmp_path / "log").read_text().splitlines()]
    log = log[log.index(["MARK", "steps"]) : log.index(["MARK", "end"])]
    crops = [line[1] for line in log if line[0] == "TRITON"]
    copies = [line[1] for line in log if line[0] == "MEMCPY"]
    # the fourth batch is given out while the fifth is on its way, of which crops are made when it is asked for
    assert len(crops) == 20
    assert set(crops) == {"_crop_resize_yuv420_kernel"}
    assert copies.count("H2D") == 19
    assert "D2H" not in copies


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
