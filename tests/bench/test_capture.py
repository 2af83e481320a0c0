"""python -m bench capture: what counts as different, and what cannot be captured."""

import pytest
import torch

from bench import steps
from bench.__main__ import main
from bench.capture import differing
from mimir_fast.training.engine import Engine
from mimir_fast.training.optimizer import Updater
from mimir_fast.training.step_graph import StaticTensors
from tests.support.simulation import needs_simulated_gpu
from tests.support.tape import Tape

SMALL = "--model mae_vit_nano --batch_size 2 --input_size 32 --patch_size 8 --no_compile".split()


def test_a_single_bit_is_a_difference():
    these = {"a": torch.ones(3), "b": torch.ones(2)}
    assert differing(these, {name: t.clone() for name, t in these.items()}) == ""
    those = {"a": torch.tensor([1, 1, 1 + 2**-23]), "b": torch.ones(2)}
    assert differing(these, those) == "1 of 2 parameters differ: a by 1.19e-07"
    assert "nan" in differing({"a": torch.tensor(torch.nan)}, {"a": torch.tensor(torch.nan)})


def test_a_cpu_captures_nothing(capsys):
    assert main(["capture", *SMALL, "--device", "cpu", "--updates", "1"]) == 2
    assert "step_graph: the step is not captured: on cpu" in capsys.readouterr().err


@needs_simulated_gpu
def test_on_a_simulated_gpu(capfd):
    """With a graph for the first and one for the last micro-step; tests/runs/test_step_graph.py has those of one graph."""
    assert main(["capture", "--simulate", "h100", *SMALL, "--updates", "5", "--accum_iter", "2"]) == 0
    assert "5 captured and 5 uncaptured updates: the same parameters" in capfd.readouterr().out


@pytest.mark.parametrize(
    ("frozen", "status"),
    [(None, 0), ((Updater, "place"), 1), ((Engine, "_seed"), 1), ((StaticTensors, "put"), 1)],
    ids=["right", "learning rate", "seed", "batch"],
)
def test_what_a_wrong_capture_has_frozen_is_seen(frozen, status, monkeypatch, capsys):
    tape = Tape()

    def engine(task, world) -> Engine:
        return Engine(task, world, recorder=tape if task.run.config.compute.step_graph == "auto" else None)

    monkeypatch.setattr(steps, "Engine", engine)
    if frozen:
        done = getattr(*frozen)

        def stays(self, *args):
            return getattr(self, "tensors", None) if tape.launched else done(self, *args)

        monkeypatch.setattr(*frozen, stays)
    # more updates than rows of the table of metrics
    words = [*SMALL, "--device", "cpu", "--updates", "6", "--log_every", "4"]
    assert main(["capture", *words]) == status
    assert tape.launched == 2
    assert ("parameters differ" in capsys.readouterr().out) == status
