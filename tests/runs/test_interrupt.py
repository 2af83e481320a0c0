"""Ctrl-C twice: the second one ends a training at once, with status 130, no traceback, and everything closed."""

import os
import signal

import pytest

from mimir_fast.training.engine import Engine
from tests.support import finetune_runs, runs

START = {"pretrain": (runs.run, runs.make_images), "finetune": (finetune_runs.finetune, finetune_runs.make_data)}


@pytest.mark.parametrize("verb", START)
def test_a_second_ctrl_c_ends_at_once(verb, tmp_path, monkeypatch, capsys):
    train, make_data = START[verb]
    advance, steps = Engine.advance, []

    def interrupted(self, *arguments):
        steps.append(arguments)
        if len(steps) == 2:
            for _ in range(2):
                os.kill(os.getpid(), signal.SIGINT)
        return advance(self, *arguments)

    monkeypatch.setattr(Engine, "advance", interrupted)
    before = signal.getsignal(signal.SIGINT)
    assert train(make_data(tmp_path / "data"), tmp_path / "out", "--epochs 1") == 130
    assert len(steps) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line == f"mimir-fast {verb}: stopped at once; --resume auto goes on from the last checkpoint"
    assert signal.getsignal(signal.SIGINT) is before
