"""Runs that fail: diverged, refused by the machine; what is saved of them and what is not."""

import pytest
import torch

from mimir_fast.checkpoints.errors import CheckpointError
from mimir_fast.data.errors import NoBatchError
from mimir_fast.training.task import Measured
from tests.support.runs import lines, load
from tests.support.toy_task import ToyTask, build_loop, finish


class Diverging(ToyTask):
    def step(self, *inputs):
        output = super().step(*inputs)
        return output._replace(loss=output.loss * torch.inf)


def test_a_diverged_run_keeps_its_parameters_and_its_last_batch(tmp_path, capsys):
    loop = build_loop(tmp_path, Diverging, max_bad_steps=2)
    before = loop.task.model.weight.detach().clone()
    assert finish(loop) == 1
    assert "error: 2 updates in a row (max_bad_steps)" in capsys.readouterr().out
    state = load(tmp_path / "failed-0-4.pth")
    assert torch.equal(state["model"]["weight"], before)
    assert state["batch"].keys() == {"images", "labels", "loss", "noise"}
    assert torch.equal(state["batch"]["images"], next(loop.stream.epoch(0, 3))[0])


class Failing(ToyTask):
    """An error of the machine or the data in epoch 1, at `at`, unless the run is resumed."""

    error, at = MemoryError(), 2

    def step(self, objective, attacked, functions, pixels, noise):
        if self.told[-1] == (1, self.at) and not self.run.config.run.resume:
            raise self.error
        return super().step(objective, attacked, functions, pixels, noise)


HOST = "[enforce fail at alloc_cpu.cpp:118] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."
REFUSED = [MemoryError(), RuntimeError(HOST), torch.OutOfMemoryError("CUDA out of memory."), NoBatchError("killed")]


@pytest.mark.parametrize("error", REFUSED, ids=lambda e: type(e).__name__)
def test_what_is_done_is_saved_when_the_machine_refuses(tmp_path, error, monkeypatch, capsys):
    """Planted: no save; a save at the position of the step before."""
    monkeypatch.setattr(Failing, "error", error)
    whole = build_loop(tmp_path / "whole")
    assert finish(whole) == 0
    with pytest.raises(type(error)):
        finish(build_loop(tmp_path / "run", Failing))
    assert (tmp_path / "run" / "resume-1-2.pth").exists()
    assert "the state after the last update was saved" in capsys.readouterr().out
    assert [row["update"] for row in lines(tmp_path / "run" / "metrics.jsonl")] == [1, 2, 3]
    again = build_loop(tmp_path / "run", Failing, resume="auto")
    assert finish(again) == 0
    assert torch.equal(again.task.model.weight, whole.task.model.weight)


@pytest.mark.parametrize("where", ["within an update's micro-steps", "in the update", "a bug", "disk full"])
def test_what_cannot_be_gone_on_from_is_not_saved(tmp_path, where, monkeypatch, capsys):
    """Planted: gradients of half an update lost in silence; parameters saved that an update had half changed."""
    monkeypatch.setattr(Failing, "at", 3 if where.startswith("within") else 2)
    monkeypatch.setattr(Failing, "error", KeyError("bug") if where == "a bug" else MemoryError())
    loop = build_loop(tmp_path, ToyTask if where == "in the update" else Failing)
    if where == "in the update":
        update = loop.engine.updater.update
        loop.engine.updater.update = lambda: (
            update() if loop.position.update < 3 else (_ for _ in ()).throw(MemoryError())
        )
    if where == "disk full":
        monkeypatch.setattr(loop.saver, "save", lambda *inputs: (_ for _ in ()).throw(CheckpointError("no room")))
        monkeypatch.setattr(loop.task, "keeps", lambda epoch: False)
        monkeypatch.setattr(loop.task, "end_epoch", lambda *inputs: Measured({"bias": 0.0}))
    with pytest.raises((MemoryError, KeyError)):
        finish(loop)
    assert not list(tmp_path.glob("resume-*"))
    assert ("the state could not be saved (no room)" in capsys.readouterr().out) == (where == "disk full")
