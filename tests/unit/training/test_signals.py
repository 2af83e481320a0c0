"""Signals: Ctrl-C once and twice, a hang-up while the data is silent, nohup."""

import os
import signal

import pytest

from mimir_fast.data.errors import NoBatchError
from mimir_fast.training.signals import StopSignals
from tests.support.toy_task import ToyStream, ToyTask, build_loop, finish


class Pressed(ToyTask):
    """Ctrl-C in the third micro-step, and where `again` once more in the fourth."""

    again = False

    def host_draws(self, images, epoch, step):
        if epoch == 0 and step in ((2, 3) if self.again else (2,)):
            os.kill(os.getpid(), signal.SIGINT)
        return super().host_draws(images, epoch, step)


class PressedTwice(Pressed):
    again = True


def test_ctrl_c_saves_after_the_update_and_a_second_one_interrupts(tmp_path, capsys):
    assert finish(build_loop(tmp_path / "once", Pressed)) == 130
    assert "stopped by SIGINT; go on with --resume auto" in capsys.readouterr().out
    assert (tmp_path / "once" / "resume-0-4.pth").exists()
    loop, before = build_loop(tmp_path / "twice", PressedTwice), signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        finish(loop)
    assert loop.position.update == 1
    assert signal.getsignal(signal.SIGINT) is before


def test_a_signal_ends_a_run_whose_data_does_not_come(tmp_path):
    """Planted: the flag is looked at after an update only."""

    class Silent(ToyStream):
        def epoch(self, epoch, start_step=0):
            for step, batch in enumerate(super().epoch(epoch, start_step), start_step):
                if (epoch, step) == (1, 2):
                    os.kill(os.getpid(), signal.SIGHUP)
                    assert self.interrupted()
                    raise NoBatchError("stopped while the data workers were silent")
                yield batch

    class Waiting(ToyTask):
        def __init__(self, run):
            super().__init__(run)
            self.stream = Silent()

    assert finish(build_loop(tmp_path, Waiting)) == 0
    assert (tmp_path / "resume-1-2.pth").exists()


def test_a_run_under_nohup_outlives_its_terminal():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopSignals() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert stop.received is None
    finally:
        signal.signal(signal.SIGHUP, before)
