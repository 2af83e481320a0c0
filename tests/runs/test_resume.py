"""Exact resume: in mid-epoch, after kills and signals, from damaged and foreign checkpoints."""

import os
import random
import signal
import time

import pytest
import torch

from tests.support.runs import PATIENCE, finish, lines, load, make_images, run, same_state, start


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_images(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    """An uninterrupted run of two epochs of six updates."""
    out = tmp_path_factory.mktemp("whole")
    assert run(data, out) == 0
    return out


@pytest.mark.slow
@pytest.mark.parametrize("extra", ["", "--accum_iter 2 --num_workers 2", "--mi_train renyi2 --steps 2 --use_normalize"])
def test_resume_in_mid_epoch_is_exact(data, tmp_path, extra):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert run(data, whole, extra) == 0
    assert run(data, broken, f"{extra} --max_steps 2") == 0
    assert run(data, broken, f"{extra} --max_steps 4 --resume auto") == 0
    random.seed(99)
    torch.manual_seed(99)  # whatever state the process is in
    assert run(data, broken, f"{extra} --resume auto") == 0
    assert same_state(load(whole / "checkpoint-1.pth"), load(broken / "checkpoint-1.pth"))
    times = ("images_per_s", "data_wait", "peak_memory_gib")
    for name in ("log.txt", "metrics.jsonl"):
        for mine, theirs in zip(lines(whole / name), lines(broken / name), strict=True):
            assert {k: v for k, v in mine.items() if k not in times} == pytest.approx(
                {k: v for k, v in theirs.items() if k not in times}
            )


def test_larger_batches_from_a_later_epoch_on_do_not_end_the_run(data, whole, tmp_path):
    """Six updates are done; at eight images per update the two epochs would have had six in all."""
    source = whole / "checkpoint-0.pth"
    assert run(data, tmp_path, f"--batch_size 8 --resume {source}") == 0
    assert load(tmp_path / "checkpoint-1.pth")["mimir_fast"]["update"] == 9
    assert [row["epoch"] for row in lines(tmp_path / "log.txt")] == [1]


@pytest.mark.slow
@pytest.mark.parametrize("updates", [1, 7])
def test_sigkill_and_resume_is_exact(data, whole, tmp_path, updates):
    """Killed as soon as that many updates are on disk, wherever the process is by then, saving included."""
    child = start(data, tmp_path, "--checkpoint_steps 1 --log_every 1")
    deadline = time.monotonic() + PATIENCE
    while not any(tmp_path.glob(f"resume-{updates // 6}-{updates % 6}.pth")):
        assert time.monotonic() < deadline, child.stdout.read()
        assert child.poll() is None, child.stdout.read()
        time.sleep(0.002)
    child.kill()
    finish(child)
    assert not (tmp_path / "checkpoint-1.pth").exists()
    (tmp_path / "resume-1-5.pth.tmp").write_bytes(b"half a file")
    assert run(data, tmp_path, "--resume auto") == 0
    assert same_state(load(whole / "checkpoint-1.pth"), load(tmp_path / "checkpoint-1.pth"))
    assert [row["update"] for row in lines(tmp_path / "metrics.jsonl")] == list(range(1, 13))
    assert not list(tmp_path.glob("*.tmp"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGTERM, 0), (signal.SIGUSR1, 0), (signal.SIGHUP, 0), (signal.SIGINT, 130)]
)
def test_signals_save_and_end_within_a_step(data, tmp_path, number, status):
    # Ignored, and inherited so, where the tests run under nohup.
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    child = start(data, tmp_path, "--epochs 1000 --log_every 1 --num_workers 1")
    signal.signal(signal.SIGHUP, before)
    seen = ""
    while "step/s" not in seen and "s/step" not in seen:
        seen = child.stdout.readline()
        assert seen, "ended early"
    os.kill(child.pid, number)
    out = finish(child)
    assert child.returncode == status, out
    assert number.name in out
    saved = [p for p in tmp_path.glob("*.pth") if p.name != "checkpoint-0.pth"]
    assert saved, "nothing saved"
    updates = lines(tmp_path / "metrics.jsonl")[-1]["update"]
    assert max(load(p)["mimir_fast"]["update"] for p in saved) == updates
    assert updates < 6000


def test_finished_run_and_missing_checkpoints(data, whole, tmp_path, capsys):
    before = load(whole / "checkpoint-1.pth")
    assert run(data, whole, "--resume auto") == 0
    assert same_state(before, load(whole / "checkpoint-1.pth"))
    assert "done" in capsys.readouterr().out
    assert run(data, tmp_path, "--resume auto --max_steps 1") == 0
    assert "no checkpoint" in capsys.readouterr().out
    assert run(data, tmp_path, "--resume nowhere.pth") == 2
    assert "nowhere.pth" in capsys.readouterr().err


def test_truncated_newest_checkpoint_falls_back(data, whole, tmp_path, capsys):
    assert run(data, tmp_path, "--checkpoint_steps 1 --max_steps 4") == 0
    os.truncate(tmp_path / "resume-0-4.pth", 5000)
    assert run(data, tmp_path, "--resume auto") == 0
    out = capsys.readouterr().out
    assert "resume-0-4.pth is damaged" in out
    assert "resumed" in out
    assert "resume-0-3.pth" in out
    assert same_state(load(whole / "checkpoint-1.pth"), load(tmp_path / "checkpoint-1.pth"))


def test_original_style_checkpoint_continues_at_the_next_epoch(data, whole, tmp_path):
    state = load(whole / "checkpoint-0.pth")
    del state["mimir_fast"]
    torch.save(state, tmp_path / "theirs.pth")
    assert run(data, tmp_path / "out", f"--resume {tmp_path / 'theirs.pth'}") == 0
    assert same_state(load(whole / "checkpoint-1.pth"), load(tmp_path / "out" / "checkpoint-1.pth"))


def test_new_run_in_a_used_folder_keeps_the_old_files_and_is_the_one_resumed(data, tmp_path, capsys):
    assert run(data, tmp_path, "--max_steps 4") == 0
    old = (tmp_path / "metrics.jsonl").read_text()
    assert run(data, tmp_path, "--max_steps 2 --seed 5") == 0
    assert "resume-0-4.pth is past this run's start" in capsys.readouterr().out
    assert (tmp_path / "superseded" / "resume-0-4.pth").exists()
    assert (tmp_path / "metrics.jsonl.old").read_text() == old
    assert len(lines(tmp_path / "metrics.jsonl")) == 2
    assert run(data, tmp_path, "--max_steps 3 --seed 5 --resume auto") == 0
    assert "resume-0-2.pth: epoch 0, micro-step 2" in capsys.readouterr().out
