"""The loop with a toy task: order, accumulation, schedule, sums, logs, checkpoints, ends, and what a task can count on."""

import itertools
import math
import os
import signal

import pytest
import torch

from mimir_fast.data import DataError
from mimir_fast.training.distributed import World
from mimir_fast.training.epoch_sums import EpochSums
from mimir_fast.training.loop import Loop
from mimir_fast.training.seeds import step_seed
from tests.support.runs import lines, load
from tests.support.toy_task import CPU, STEPS, ToyTask, toy_run


def build(folder="", task_type=ToyTask, **flags) -> Loop:
    torch.manual_seed(3)
    return Loop(task_type(toy_run(folder, **flags)), World())


def finish(loop: Loop) -> int:
    try:
        return loop.run()
    finally:
        loop.close()


def test_a_task_is_asked_in_the_order_of_its_data():
    loop = build()
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
            pixels = task.prepare(images_u8, labels, epoch, step)
            noise = task.draw_noise(torch.Generator().manual_seed(step_seed(0, 0, epoch, step)), pixels)
            (task.step(task.model, None, None, pixels, noise).loss / 2).backward()
        where = epoch + first / STEPS
        rates.append(0.1 * where if where < 1 else 0.1 * (1 + math.cos(math.pi * (where - 1) / 2)) / 2)
        optimizer.param_groups[0]["lr"] = rates[-1]
        optimizer.step()
        optimizer.zero_grad()
    return task.model.weight, rates


def test_accumulation_schedule_and_the_rows_of_updates(tmp_path):
    loop = build(tmp_path)
    weight, rates = by_hand(loop)
    assert finish(loop) == 0
    assert torch.allclose(loop.task.model.weight, weight, rtol=1e-5)
    rows = lines(tmp_path / "metrics.jsonl")
    assert [row["lr"] for row in rows] == pytest.approx(rates, abs=1e-9)
    assert [row["update"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert [row["epoch"] for row in rows] == pytest.approx([0.2, 0.6, 1.2, 1.6, 2.2, 2.6])
    assert all(0.05 < row["largest"] <= 0.1 for row in rows)


def test_updates_that_a_resume_point_counts_are_logged_before_it(tmp_path):
    loop = build(tmp_path, log_every=4, checkpoint_steps=3)
    saved, save = [], loop._save

    def noting(*inputs):
        save(*inputs)
        saved.append((loop.position.update, [row["update"] for row in lines(tmp_path / "metrics.jsonl")]))

    loop._save = noting
    assert finish(loop) == 0
    assert 3 in [update for update, _ in saved]
    assert all(logged == list(range(1, update + 1)) for update, logged in saved)


def test_an_epochs_line_holds_means_of_all_its_micro_steps(tmp_path):
    loop, losses = build(tmp_path), []
    step = loop.task.step
    loop.task.step = lambda *inputs: losses.append(step(*inputs)) or losses[-1]
    assert finish(loop) == 0
    for epoch, row in enumerate(lines(tmp_path / "log.txt")):
        mine = losses[STEPS * epoch : STEPS * (epoch + 1)]
        assert row["train_loss"] == pytest.approx(sum(output.loss.item() for output in mine) / STEPS)
        assert row["noise"] == pytest.approx(sum(output.noise.mean().item() for output in mine) / STEPS)
        assert list(row)[:5] == ["train_lr", "train_loss", "epoch", "noise", "bias"]


def test_checkpoints_are_those_the_task_keeps_the_best_and_the_last(tmp_path):
    assert finish(build(tmp_path)) == 0
    assert {p.name for p in tmp_path.glob("*.pth")} == {"checkpoint-0.pth", "checkpoint-2.pth", "best.pth"}
    assert load(tmp_path / "best.pth")["epoch"] == 1
    assert load(tmp_path / "best.pth")["mimir_fast"]["best"] == 1
    assert (tmp_path / "sample.txt").exists()
    # a run that has no best epoch yet puts another's aside
    assert finish(build(tmp_path, max_steps=1)) == 0
    assert (tmp_path / "superseded" / "best.pth").exists()


@pytest.mark.parametrize("stops", [(1,), (2, 3), (5,)])
def test_a_run_in_pieces_is_the_whole_run(tmp_path, stops):
    whole = build(tmp_path / "whole")
    assert finish(whole) == 0
    for stop in (*stops, 0):
        piece = build(tmp_path / "pieces", max_steps=stop, resume="auto")
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
    whole = build(tmp_path / "whole")
    assert finish(whole) == 0
    loop = build(tmp_path / "broken", kind)
    if kind is Unreadable:
        with pytest.raises(DataError, match=r"a\.png"):
            finish(loop)
    else:
        assert finish(loop) == 0
    assert load(tmp_path / "broken" / f"resume-1-{STEPS}.pth")["mimir_fast"]["step"] == STEPS
    # even one that has no updates left
    again = build(tmp_path / "broken", kind, resume="auto", max_steps=4)
    assert finish(again) == 0
    assert again.task.told == [("epoch 1",), ("end 1",)]
    again = build(tmp_path / "broken", kind, resume="auto")
    assert finish(again) == 0
    assert [row["epoch"] for row in lines(tmp_path / "broken" / "log.txt")] == [0, 1, 2]
    assert torch.equal(whole.task.model.weight, again.task.model.weight)


class Diverging(ToyTask):
    def step(self, *inputs):
        output = super().step(*inputs)
        return output._replace(loss=output.loss * torch.inf)


def test_a_diverged_run_keeps_its_parameters_and_its_last_batch(tmp_path, capsys):
    loop = build(tmp_path, Diverging, max_bad_steps=2)
    before = loop.task.model.weight.detach().clone()
    assert finish(loop) == 1
    assert "error: 2 updates in a row (max_bad_steps)" in capsys.readouterr().out
    state = load(tmp_path / "failed-0-4.pth")
    assert torch.equal(state["model"]["weight"], before)
    assert state["batch"].keys() == {"images", "labels", "loss", "noise"}
    assert torch.equal(state["batch"]["images"], next(loop.stream.epoch(0, 3))[0])


class Pressed(ToyTask):
    """Ctrl-C in the third micro-step, and where `again` once more in the fourth."""

    again = False

    def prepare(self, images_u8, labels, epoch, step):
        if epoch == 0 and step in ((2, 3) if self.again else (2,)):
            os.kill(os.getpid(), signal.SIGINT)
        return super().prepare(images_u8, labels, epoch, step)


class PressedTwice(Pressed):
    again = True


def test_ctrl_c_saves_after_the_update_and_a_second_one_interrupts(tmp_path, capsys):
    assert finish(build(tmp_path / "once", Pressed)) == 130
    assert "stopped by SIGINT; go on with --resume auto" in capsys.readouterr().out
    assert (tmp_path / "once" / "resume-0-4.pth").exists()
    loop, before = build(tmp_path / "twice", PressedTwice), signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        finish(loop)
    assert loop.position.update == 1
    assert signal.getsignal(signal.SIGINT) is before


def test_nothing_is_written_without_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert finish(build()) == 0
    assert not list(tmp_path.iterdir())


def test_an_epoch_must_hold_an_update():
    with pytest.raises(ValueError, match="accum_iter: 6 exceeds the 5 micro-batches of an epoch"):
        build(accum_iter=6)


def test_sums_go_on_where_they_were_and_take_names_in_any_order():
    sums = EpochSums({}, CPU)
    sums.add({"a": torch.tensor(1.0), "b": torch.tensor(True)})
    sums = EpochSums(sums.means(World()), CPU)
    sums.add({"b": torch.tensor(False), "a": torch.tensor(0.5)})
    assert sums.means(World()) == {"a": 1.5, "b": 1.0}
