"""Exact resume of fine-tunings: in mid-epoch, after kills, and where a signal interrupts a validation."""

import os
import random
import shutil
import signal
import time

import pytest
import torch

from mimir_fast.config.finetuning import FinetuneConfig
from mimir_fast.training import validator as rating
from tests.support.finetune_runs import finetune, lines, load, make_data, same_run, start, small_models
from tests.support.runs import PATIENCE, finish

RATED = "--model_ema --held_out 2 --val_attack pgd2"  # 24 images are left: six batches of four


@pytest.fixture(autouse=True, scope="module")
def _tiny():
    with pytest.MonkeyPatch.context() as patch:
        small_models(patch.setitem)
        yield


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    """An uninterrupted run of two epochs of six updates."""
    out = tmp_path_factory.mktemp("whole")
    assert finetune(data, out, RATED) == 0
    return out


def check_same(whole, broken) -> None:
    """Everything but times."""
    for name in ("checkpoint-0.pth", "checkpoint-1.pth", "best.pth"):
        assert same_run(load(whole / name), load(broken / name)), name
    times = ("images_per_s", "data_wait", "peak_memory_gib")
    for name in ("log.txt", "metrics.jsonl"):
        for mine, theirs in zip(lines(whole / name), lines(broken / name), strict=True):
            assert {k: v for k, v in mine.items() if k not in times} == pytest.approx(
                {k: v for k, v in theirs.items() if k not in times}
            )


@pytest.mark.parametrize(
    "extra",
    [
        RATED,
        f"{RATED} --attack_train trades --accum_iter 2 --num_workers 1",
        f"{RATED} --attack_train apgd --mixup 0.8 --cutmix 1.0 --warmup_aa --clip_grad 1 --aa rand-m9-mstd0.5-inc1 "
        "--alpha_schedule cosine --eps_warmup_epochs 1",
    ],
)
def test_resume_in_mid_epoch_is_exact(data, tmp_path, extra):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert finetune(data, whole, extra) == 0
    assert finetune(data, broken, f"{extra} --max_steps 2") == 0
    random.seed(99)
    torch.manual_seed(99)  # whatever state the process is in
    assert finetune(data, broken, f"{extra} --max_steps 4 --resume auto") == 0
    assert finetune(data, broken, f"{extra} --resume auto") == 0
    check_same(whole, broken)


def test_the_last_update_is_not_the_end_of_the_last_epoch(data, tmp_path):
    """With four micro-batches per update and six per epoch, two come after the last one, then validation and checkpoint."""
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert finetune(data, whole, f"{RATED} --accum_iter 4") == 0
    assert finetune(data, broken, f"{RATED} --accum_iter 4 --max_steps 2") == 0
    assert not (broken / "checkpoint-1.pth").exists()
    assert finetune(data, broken, f"{RATED} --accum_iter 4 --resume auto") == 0
    check_same(whole, broken)


def test_a_best_epoch_chosen_by_something_else_does_not_count():
    """Else clean accuracies would stand where robust ones are compared, and best.pth never change again."""
    config, said = FinetuneConfig().updated({"val_attack": "pgd10", "held_out": 5}), []
    by_same, by_clean = ({"best": [90.0, 90.0, 3.0], "best_by": [word, 8.0, 4]} for word in ("pgd10", "none"))
    by_same["best_by"] = rating.criterion(config)
    assert rating.best_so_far(by_same, config, said.append) == [90.0, 90.0, 3.0]
    assert rating.best_so_far({}, config, said.append) is None
    assert not said
    assert rating.best_so_far(by_clean, config, said.append) is None
    assert "none at eps 8 on 4" in said[0]
    assert "pgd10 at eps 8 on 5" in said[0]
    assert "trained on are now held out" in said[0]


@pytest.mark.slow
@pytest.mark.parametrize("updates", [2, 7])
def test_sigkill_and_resume_is_exact(data, whole, tmp_path, updates):
    """Killed as soon as that many updates are on disk, wherever the process is by then, validation and saving included."""
    child = start(data, tmp_path, f"{RATED} --checkpoint_steps 1 --log_every 1")
    deadline = time.monotonic() + PATIENCE
    while not any(tmp_path.glob(f"resume-{updates // 6}-{updates % 6}.pth")):
        assert time.monotonic() < deadline, child.stdout.read()
        assert child.poll() is None, child.stdout.read()
        time.sleep(0.002)
    child.kill()
    finish(child)
    (tmp_path / "resume-1-5.pth.tmp").write_bytes(b"half a file")
    assert finetune(data, tmp_path, f"{RATED} --resume auto") == 0
    check_same(whole, tmp_path)
    assert not list(tmp_path.glob("*.tmp"))
    assert load(tmp_path / "best.pth")["mimir_fast"]["best_by"] == ["pgd2", 8.0, 2]


@pytest.mark.slow
def test_signals_save_and_end_within_a_step(data, tmp_path):
    child = start(data, tmp_path, "--epochs 1000 --log_every 1 --num_workers 1")
    seen = ""
    while "step/s" not in seen and "s/step" not in seen:
        seen = child.stdout.readline()
        assert seen, "ended early"
    os.kill(child.pid, signal.SIGINT)
    out = finish(child, 120)
    assert child.returncode == 130, out
    assert "SIGINT" in out
    updates = lines(tmp_path / "metrics.jsonl")[-1]["update"]
    assert max(load(p)["mimir_fast"]["update"] for p in tmp_path.glob("*.pth")) == updates


def test_a_signal_during_validation_ends_at_once_and_the_validation_is_repeated(
    data, whole, tmp_path, monkeypatch, capsys
):
    real, calls = rating.validate, []

    def interrupted(*args):
        calls.append(0)
        if len(calls) == 4:  # the second epoch's held-out images
            os.kill(os.getpid(), signal.SIGTERM)
        return real(*args)

    monkeypatch.setattr(rating, "validate", interrupted)
    assert finetune(data, tmp_path, RATED) == 0
    assert "stopped by SIGTERM" in capsys.readouterr().out
    assert len(lines(tmp_path / "log.txt")) == 1
    assert load(tmp_path / "resume-1-6.pth")["mimir_fast"]["update"] == 12
    assert finetune(data, tmp_path, f"{RATED} --resume auto") == 0
    check_same(whole, tmp_path)


def test_an_unreadable_test_image_loses_nothing(data, whole, tmp_path, capsys):
    broken = tmp_path / "images"
    shutil.copytree(data, broken)
    image = sorted(broken.glob("val/*/*"))[5]
    content = image.read_bytes()
    image.write_bytes(content[:40])
    assert finetune(broken, tmp_path / "out", RATED) == 1
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert str(image) in line
    assert load(tmp_path / "out" / "resume-0-6.pth")["mimir_fast"]["update"] == 6
    image.write_bytes(content)
    assert finetune(broken, tmp_path / "out", f"{RATED} --resume auto") == 0
    check_same(whole, tmp_path / "out")


def test_an_average_that_appears_or_ends_is_told(data, whole, tmp_path, capsys):
    where = f"--resume {whole / 'checkpoint-1.pth'} --epochs 2"
    assert finetune(data, tmp_path / "without", f"{where} --held_out 2 --val_attack pgd2") == 0
    assert "without the flag it ends here" in capsys.readouterr().out
    state = load(whole / "checkpoint-1.pth")
    del state["model_ema"]
    torch.save(state, tmp_path / "none.pth")
    assert finetune(data, tmp_path / "with", f"{RATED} --resume {tmp_path / 'none.pth'}") == 0
    assert "starts from the parameters of now" in capsys.readouterr().out


def test_a_finished_run_stays_and_a_new_one_puts_its_best_aside(data, tmp_path, capsys):
    assert finetune(data, tmp_path, f"{RATED} --epochs 1") == 0
    before = load(tmp_path / "checkpoint-0.pth")
    assert finetune(data, tmp_path, f"{RATED} --epochs 1 --resume auto") == 0
    assert same_run(before, load(tmp_path / "checkpoint-0.pth"))
    assert (tmp_path / "best.pth").exists()
    assert finetune(data, tmp_path, f"{RATED} --seed 3 --max_steps 1") == 0
    assert "best.pth is not of this run's past and was moved to superseded/" in capsys.readouterr().out
    assert not (tmp_path / "best.pth").exists()
    assert (tmp_path / "superseded" / "best.pth").exists()


def test_a_checkpoint_of_the_original_continues_at_the_next_epoch(data, whole, tmp_path):
    state = load(whole / "checkpoint-0.pth")
    del state["mimir_fast"]
    torch.save(state, tmp_path / "theirs.pth")
    assert finetune(data, tmp_path / "out", f"{RATED} --resume {tmp_path / 'theirs.pth'}") == 0
    ours, theirs = load(whole / "checkpoint-1.pth"), load(tmp_path / "out" / "checkpoint-1.pth")
    for entry in ("model", "model_ema"):
        assert all(torch.equal(ours[entry][key], theirs[entry][key]) for key in ours[entry])
