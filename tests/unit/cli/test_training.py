"""How a verb that trains ends: what is built and closed, statuses, and Ctrl-C at every moment."""

import os

import pytest

from mimir_fast.checkpoints.errors import CheckpointError
from mimir_fast.cli.finetune import FINETUNE
from mimir_fast.cli.pretrain import PRETRAIN
from mimir_fast.cli.training import train
from mimir_fast.data import DataError


class Fake:
    """A training that ends as it is told: `error` when it runs, `late` when it is closed."""

    def __init__(self, error=None, late=None):
        self.error, self.late, self.closed = error, late, 0

    def run(self):
        if self.error:
            raise self.error
        return 0

    def close(self):
        self.closed += 1
        if self.late:
            raise self.late


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def failing(error):
    def build(run, world):
        raise error

    return build


@pytest.mark.parametrize("command", [PRETRAIN, FINETUNE], ids=lambda c: c.prog)
@pytest.mark.parametrize(
    ("error", "status"),
    [
        (None, 0),
        (KeyboardInterrupt(), 130),
        (DataError("images: broken"), 1),
        (CheckpointError("resume: broken"), 1),
        (OSError("disk full"), 1),
    ],
)
def test_a_running_training_ends_with_a_status_and_is_closed(command, error, status, capsys):
    fake = Fake(error)
    assert train(command, ["--device", "cpu"], lambda run, world: fake) == status
    assert fake.closed == 1
    said = capsys.readouterr().err
    at_once = f"{command.prog}: stopped at once; --resume auto goes on from the last checkpoint\n"
    assert said == {0: "", 1: f"{command.prog}: error: {error}\n", 130: at_once}[status]


@pytest.mark.parametrize("command", [PRETRAIN, FINETUNE], ids=lambda c: c.prog)
def test_what_goes_wrong_before_the_first_update(command, capsys):
    for error in (ValueError("lr: wrong"), DataError("images: broken"), OSError("no folder")):
        assert train(command, ["--device", "cpu"], failing(error)) == 2
        assert capsys.readouterr().err == f"{command.prog}: error: {error}\n"
    assert train(command, ["--device", "cpu"], failing(KeyboardInterrupt())) == 130
    assert capsys.readouterr().err == f"{command.prog}: stopped before the first update\n"
    assert train(command, ["--device", "cpu", "--epochs", "0"], failing(AssertionError("built"))) == 2
    assert "epochs: got 0" in capsys.readouterr().err


def test_ctrl_c_while_closing_is_no_traceback(capsys):
    assert train(PRETRAIN, ["--device", "cpu"], lambda run, world: Fake(late=KeyboardInterrupt())) == 130
    assert capsys.readouterr().err.count("\n") == 1


def test_a_bug_in_the_loop_stays_a_traceback():
    fake = Fake(ValueError("a bug"))
    with pytest.raises(ValueError, match="a bug"):
        train(PRETRAIN, ["--device", "cpu"], lambda run, world: fake)
    assert fake.closed == 1


def test_what_is_built_gets_the_resolved_run_and_something_else_may_be_asked_for():
    seen = []

    def build(run, world):
        seen.append((run.config.optim.batch_size, run.compute.kernels, run.device, world.rank, world.size))
        return Fake()

    words = ["--device", "cpu", "--batch_size", "3"]
    assert train(PRETRAIN, words, build) == 0
    assert seen == [(3, "reference", "cpu", 0, 1)]
    assert train(PRETRAIN, words, build, instead=lambda run: 7 if "batch_size" in run.explicit else None) == 7
    assert train(PRETRAIN, words, build, instead=lambda run: None) == 0
    assert len(seen) == 2


def test_two_runs_on_one_folder_are_an_error_that_names_the_first(tmp_path, capsys):
    """Planted: no lock."""

    def second(run, world):
        assert train(PRETRAIN, ["--device", "cpu", "--output_dir", "mine"], failing(AssertionError("built"))) == 2
        assert f"output_dir: mine is in use by process {os.getpid()} on " in capsys.readouterr().err
        assert train(PRETRAIN, ["--device", "cpu", "--output_dir", "another"], lambda run, world: Fake()) == 0
        return Fake()

    assert train(PRETRAIN, ["--device", "cpu", "--output_dir", "mine"], second) == 0
    assert not list((tmp_path / "mine").iterdir())
