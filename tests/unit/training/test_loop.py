"""The loop with a toy task: order, accumulation, schedule, sums, logs, checkpoints, ends, and what a task can count on."""

import itertools
import math
import os
import signal
import sys
from types import SimpleNamespace

import pytest
import torch

from mimir_fast.checkpoints.errors import CheckpointError
from mimir_fast.data import DataError
from mimir_fast.training.distributed import World
from mimir_fast.training.epoch_sums import EpochSums
from mimir_fast.training.loop import Loop
from mimir_fast.training.seeds import step_seed
from tests.support.runs import lines, load
from tests.support.toy_task import CPU, STEPS, ToyTask, build_loop, finish


def test_a_task_is_asked_in_the_order_of_its_data():
    loop = build_loop()
    assert finish(loop) == 0
    asked = iter(loop.task.told)
    for epoch in range(3):
        assert next(asked) == (f"epoch {epoch}",)
        assert [next(asked) for _ in range(STEPS)] == [(epoch, step) for step in range(STEPS)]
        assert next(asked) == (f"end {epoch}",)
    assert next(asked, None) is None


def by_hand(loop: Loop) -> tuple[torch.Tensor, list[float]]:
    """The weight that plain PyTorch arrives at from where the loop begins, and the learning rate of every update.

    Gradients are means over two micro-batches; the fifth of an epoch has no update.  Rates are of an update's first
    micro-batch: one epoch of warm-up, half a cosine over the two after it.
    """
    task, rates = ToyTask(loop.task.run), []
    task.model.load_state_dict(loop.task.model.state_dict())
    optimizer = torch.optim.SGD(task.model.parameters())
    for epoch, first in itertools.product(range(3), (0, 2)):
        for step in (first, first + 1):
            images_u8, labels = next(loop.stream.epoch(epoch, step))
            pixels = task.prepare(images_u8, labels, None)
            noise = task.draw_noise(torch.Generator().manual_seed(step_seed(0, 0, epoch, step)), pixels)
            (task.step(task.model, None, None, pixels, noise).loss / 2).backward()
        where = epoch + first / STEPS
        rates.append(0.1 * where if where < 1 else 0.1 * (1 + math.cos(math.pi * (where - 1) / 2)) / 2)
        optimizer.param_groups[0]["lr"] = rates[-1]
        optimizer.step()
        optimizer.zero_grad()
    return task.model.weight, rates


def test_accumulation_schedule_and_the_rows_of_updates(tmp_path):
    loop = build_loop(tmp_path)
    weight, rates = by_hand(loop)
    assert finish(loop) == 0
    assert torch.allclose(loop.task.model.weight, weight, rtol=1e-5)
    rows = lines(tmp_path / "metrics.jsonl")
    assert [row["lr"] for row in rows] == pytest.approx(rates, abs=1e-9)
    assert [row["update"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert [row["epoch"] for row in rows] == pytest.approx([0.2, 0.6, 1.2, 1.6, 2.2, 2.6])
    assert all(0.05 < row["largest"] <= 0.1 for row in rows)


def test_updates_that_a_resume_point_counts_are_logged_before_it(tmp_path):
    loop = build_loop(tmp_path, log_every=4, checkpoint_steps=3)
    saved, save = [], loop.saver.save

    def noting(*inputs):
        save(*inputs)
        saved.append((loop.position.update, [row["update"] for row in lines(tmp_path / "metrics.jsonl")]))

    loop.saver.save = noting
    assert finish(loop) == 0
    assert 3 in [update for update, _ in saved]
    assert all(logged == list(range(1, update + 1)) for update, logged in saved)


def test_an_epochs_line_holds_means_of_all_its_micro_steps(tmp_path):
    loop, losses = build_loop(tmp_path), []
    step = loop.task.step
    loop.task.step = lambda *inputs: losses.append(step(*inputs)) or losses[-1]
    assert finish(loop) == 0
    for epoch, row in enumerate(lines(tmp_path / "log.txt")):
        mine = losses[STEPS * epoch : STEPS * (epoch + 1)]
        assert row["train_loss"] == pytest.approx(sum(output.loss.item() for output in mine) / STEPS)
        assert row["noise"] == pytest.approx(sum(output.noise.mean().item() for output in mine) / STEPS)
        assert list(row)[:5] == ["train_lr", "train_loss", "epoch", "noise", "bias"]


def test_checkpoints_are_those_the_task_keeps_the_best_and_the_last(tmp_path):
    assert finish(build_loop(tmp_path)) == 0
    assert {p.name for p in tmp_path.glob("*.pth")} == {"checkpoint-0.pth", "checkpoint-2.pth", "best.pth"}
    assert load(tmp_path / "best.pth")["epoch"] == 1
    assert load(tmp_path / "best.pth")["mimir_fast"]["best"] == 1
    assert (tmp_path / "sample.txt").exists()
    # a run that has no best epoch yet puts another's aside
    assert finish(build_loop(tmp_path, max_steps=1)) == 0
    assert (tmp_path / "superseded" / "best.pth").exists()


@pytest.mark.parametrize("stops", [(1,), (2, 3), (5,)])
def test_a_run_in_pieces_is_the_whole_run(tmp_path, stops):
    whole = build_loop(tmp_path / "whole")
    assert finish(whole) == 0
    for stop in (*stops, 0):
        piece = build_loop(tmp_path / "pieces", max_steps=stop, resume="auto")
        assert finish(piece) == 0
    for name, p in whole.task.model.state_dict().items():
        assert torch.equal(p, piece.task.model.state_dict()[name])
    mine, theirs = (lines(tmp_path / folder / "log.txt") for folder in ("whole", "pieces"))
    times = ("images_per_s", "peak_memory_gib")
    assert [{k: v for k, v in row.items() if k not in times} for row in mine] == [
        {k: v for k, v in row.items() if k not in times} for row in theirs
    ]


class Interrupted(ToyTask):
    """A signal comes while the second epoch is measured; a run that goes on measures it."""

    def end_epoch(self, engine, epoch, ends):
        if epoch == 1 and not self.run.config.run.resume:
            os.kill(os.getpid(), signal.SIGTERM)
            assert ends()
            return None
        return super().end_epoch(engine, epoch, ends)


class Unreadable(ToyTask):
    """An image of the second epoch's validation cannot be read; later it can."""

    def end_epoch(self, engine, epoch, ends):
        if epoch == 1 and not self.run.config.run.resume:
            raise DataError("a.png is unreadable")
        return super().end_epoch(engine, epoch, ends)


@pytest.mark.parametrize("kind", [Interrupted, Unreadable])
def test_an_epoch_that_could_not_be_measured_is_measured_by_the_run_that_goes_on(tmp_path, kind):
    whole = build_loop(tmp_path / "whole")
    assert finish(whole) == 0
    loop = build_loop(tmp_path / "broken", kind)
    if kind is Unreadable:
        with pytest.raises(DataError, match=r"a\.png"):
            finish(loop)
    else:
        assert finish(loop) == 0
    assert load(tmp_path / "broken" / f"resume-1-{STEPS}.pth")["mimir_fast"]["step"] == STEPS
    # even one that has no updates left
    again = build_loop(tmp_path / "broken", kind, resume="auto", max_steps=4)
    assert finish(again) == 0
    assert again.task.told == [("epoch 1",), ("end 1",)]
    again = build_loop(tmp_path / "broken", kind, resume="auto")
    assert finish(again) == 0
    assert [row["epoch"] for row in lines(tmp_path / "broken" / "log.txt")] == [0, 1, 2]
    assert torch.equal(whole.task.model.weight, again.task.model.weight)


def names(folder):
    return {path.name for path in folder.iterdir()}


def test_nothing_is_moved_before_the_start_of_the_run_that_replaces_it_is_on_the_disk(tmp_path, monkeypatch):
    """Planted: checkpoints, best.pth or config.yaml moved while the run is built."""
    assert finish(build_loop(tmp_path)) == 0
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def refuse(path, state):
        raise CheckpointError(f"output_dir: could not save {path}")

    monkeypatch.setattr("mimir_fast.checkpoints.folder.save_checkpoint", refuse)
    with pytest.raises(CheckpointError, match=r"resume-0-0\.pth"):
        build_loop(tmp_path, seed=5)
    after = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert after.pop("config.yaml") != before["config.yaml"]
    assert after.pop("config.yaml.old") == before.pop("config.yaml")
    assert after == before


def test_a_kill_after_a_resume_that_begins_its_epoch_again_loses_no_update(tmp_path, capsys):
    """Planted: the resume points of the epoch are moved first: the run fell back to checkpoint-0.pth with its two updates."""
    first = build_loop(tmp_path, max_steps=3)
    assert finish(first) == 0
    # another seed: the position inside of the epoch means nothing; killed before its first update
    build_loop(tmp_path, resume="auto", seed=1).close()
    assert "resume-1-2.pth is past this run's start and was moved to superseded/" in capsys.readouterr().out
    assert {"resume-1-2.pth", "metrics.jsonl"} <= names(tmp_path / "superseded")
    again = build_loop(tmp_path, resume="auto", seed=1)
    assert (again.position.epoch, again.position.step, again.position.update) == (1, 0, 3)
    assert torch.equal(again.task.model.weight, first.task.model.weight)
    # the x-axis only rises: the update that the epoch's new beginning stands before is in superseded/
    assert finish(again) == 0
    rows = lines(tmp_path / "metrics.jsonl")
    assert [row["epoch"] for row in rows] == sorted(row["epoch"] for row in rows)
    assert [row["update"] for row in rows] == [1, 2, 4, 5, 6, 7]
    assert [row["update"] for row in lines(tmp_path / "superseded" / "metrics.jsonl")] == [1, 2, 3]


def test_a_start_that_is_saved_again_is_the_same_run(tmp_path):
    """The newest point is passed over by hand: sums, counts and moments of the middle of an epoch are kept."""
    whole = build_loop(tmp_path / "whole")
    assert finish(whole) == 0
    assert finish(build_loop(tmp_path / "run", checkpoint_steps=1, max_steps=4)) == 0
    build_loop(tmp_path / "run", resume=str(tmp_path / "run" / "resume-1-2.pth")).close()
    assert finish(build_loop(tmp_path / "run", resume="auto")) == 0
    for name in ("log.txt", "metrics.jsonl"):
        mine, theirs = (lines(tmp_path / folder / name) for folder in ("whole", "run"))
        times = ("images_per_s", "peak_memory_gib", "data_wait")
        assert [{k: v for k, v in row.items() if k not in times} for row in mine] == [
            {k: v for k, v in row.items() if k not in times} for row in theirs
        ]


def test_a_third_run_overwrites_nothing_of_the_first(tmp_path):
    for seed in range(3):
        assert finish(build_loop(tmp_path, seed=seed)) == 0
    for folder, seed in (("superseded", 0), ("superseded.2", 1)):
        assert load(tmp_path / folder / "checkpoint-2.pth")["args"].seed == seed
        assert load(tmp_path / folder / "best.pth")["args"].seed == seed
    for name in ("metrics.jsonl", "log.txt", "config.yaml"):
        assert {f"{name}.old", f"{name}.old.2"} <= names(tmp_path)
    assert "seed: 1" in (tmp_path / "config.yaml.old.2").read_text()


def test_a_resumed_run_goes_on_in_the_same_run_of_weights_and_biases(tmp_path, monkeypatch):
    asked = []

    def init(**words):
        asked.append((words.get("id"), words.get("resume")))
        return SimpleNamespace(log=lambda row, step: None, finish=lambda: None, id=words.get("id", f"new{len(asked)}"))

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    assert finish(build_loop(tmp_path, wandb=True, max_steps=1)) == 0
    # an hour without it does not break the thread
    assert finish(build_loop(tmp_path, resume="auto", max_steps=2)) == 0
    assert finish(build_loop(tmp_path, wandb=True, resume="auto", max_steps=3)) == 0
    assert asked == [(None, None), ("new1", "allow")]


def test_full_or_missing_places_for_logs_do_not_end_a_run(tmp_path, monkeypatch, capsys):
    """Planted: the OSError of append_text, or of the folder of log_dir, goes through."""
    (tmp_path / "file").write_text("in the way")

    def full(path, text, flag="output_dir"):
        raise OSError(f"{flag}: could not write {path}: No space left on device")

    monkeypatch.setattr("mimir_fast.training.sinks.append_text", full)
    loop = build_loop(tmp_path / "out", log_dir=str(tmp_path / "file" / "logs"))
    assert finish(loop) == 0
    assert {"checkpoint-0.pth", "checkpoint-2.pth"} <= names(tmp_path / "out")
    said = capsys.readouterr().out
    assert said.count("metrics.jsonl: No space left") == 1
    assert said.count("warning: log_dir: could not write") == 1
    assert "6 lines are missing" in said


def test_nothing_is_written_without_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert finish(build_loop()) == 0
    assert not list(tmp_path.iterdir())


def test_an_epoch_must_hold_an_update():
    with pytest.raises(ValueError, match="accum_iter: 6 exceeds the 5 micro-batches of an epoch"):
        build_loop(accum_iter=6)


def test_sums_go_on_where_they_were_and_take_names_in_any_order():
    sums = EpochSums({}, CPU)
    sums.add({"a": torch.tensor(1.0), "b": torch.tensor(True)})
    sums = EpochSums(sums.means(World()), CPU)
    sums.add({"b": torch.tensor(False), "a": torch.tensor(0.5)})
    assert sums.means(World()) == {"a": 1.5, "b": 1.0}
