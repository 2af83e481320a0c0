"""Batches from workers: a full or missing /dev/shm, workers that are killed, silent, or left alone."""

import logging
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from mimir_fast.data import BatchStream, build_pretrain_data, delivery, eval_batches
from mimir_fast.data import stream as streams
from mimir_fast.data.batch_order import ShuffleSchedule
from mimir_fast.data.datasets import dataset_info
from mimir_fast.data.delivery import delivered
from mimir_fast.data.errors import NoBatchError
from mimir_fast.data.sources import ArrayImages
from mimir_fast.data.workers import BatchMaker, workers_starting


def digits(**loading):
    return build_pretrain_data("digits", "", 32, 300, **loading)


@pytest.mark.parametrize("verb", ["train", "validate"])
def test_without_room_in_shared_memory_batches_go_through_a_pipe(monkeypatch, caplog, verb):
    """Planted: without `sent` the batch is lost in a thread of the worker, and the main process waits for ever."""

    def full(self):
        raise RuntimeError("unable to allocate shared memory(shm) for file </torch_1>: No space left on device (28)")

    def batches(workers):
        if verb == "validate":
            return list(eval_batches("digits", "", 32, 100, num_workers=workers))
        stream = digits(num_workers=workers)
        try:
            return list(stream.epoch(0))
        finally:
            stream.close()

    expected = batches(0)
    # workers are forked after this
    monkeypatch.setattr(torch.Tensor, "share_memory_", full)
    with caplog.at_level(logging.WARNING, "mimir_fast.data"):
        found = batches(2)
    assert len(found) == len(expected) > 2
    for ours, theirs in zip(found, expected):
        assert all(isinstance(part, torch.Tensor) for part in ours)
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs))
    (line,) = [record.getMessage() for record in caplog.records]
    assert "--shm-size" in line
    assert "--num_workers" in line


class Stuck(ArrayImages):
    """Images of which the second batch takes for ever."""

    taken = 0

    def take(self, indices, convert=None):
        self.taken += 1
        if self.taken > 1:
            time.sleep(10_000)
        return super().take(indices, convert)


@pytest.fixture
def stuck(monkeypatch):
    """A stream whose worker never delivers the second batch, its iterator after the first one, and the worker."""
    monkeypatch.setattr(streams, "LOOK", 0.05)
    source = Stuck(np.zeros((4, 32, 32, 3), np.uint8), np.zeros(4))
    maker = BatchMaker(source, 32, False, False, 0, 0)
    before = set(multiprocessing.active_children())
    stream = BatchStream("stuck", 4, dataset_info("digits"), ShuffleSchedule(4, 2), maker, 1)
    batches = stream.epoch(0)
    next(batches)
    (worker,) = set(multiprocessing.active_children()) - before
    yield batches, worker, stream
    worker.kill()
    stream.close()


def test_a_worker_that_the_kernel_killed_is_one_line_where_batches_are_waited_for(stuck):
    """Planted: torch's handler of SIGCHLD stays: its error comes wherever the program is, here in `join`."""
    batches, worker, _ = stuck
    os.kill(worker.pid, signal.SIGKILL)
    worker.join(60)
    with pytest.raises(NoBatchError, match=r"num_workers: a data worker ended .*memory ran out") as error:
        next(batches)
    assert "\n" not in str(error.value)


def test_silent_workers_are_an_error_after_a_while_and_a_signal_ends_the_wait(stuck, monkeypatch):
    batches = stuck[0]
    monkeypatch.setattr(delivery, "PATIENCE", 0.2)
    with pytest.raises(NoBatchError, match="no batch came for 0 s"):
        next(batches)


def test_a_stop_signal_ends_the_wait_for_silent_workers(stuck):
    batches, _, stream = stuck
    stream.interrupted = lambda: True
    with pytest.raises(NoBatchError, match="stopped while the data workers were silent"):
        next(batches)


def raising(error):
    raise error
    yield


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (RuntimeError("DataLoader worker (pid(s) 7) exited unexpectedly"), "a data worker ended"),
        (ConnectionResetError(104, "Connection reset by peer"), "a data worker ended"),
        (RuntimeError("Too many open files. Communication with the workers is no longer possible."), "ulimit -n"),
        (RuntimeError("unable to mmap 8 bytes from file </torch_1>: Cannot allocate memory (12) shm"), "--shm-size"),
    ],
)
def test_errors_of_the_transport_are_one_line(error, words):
    with pytest.raises(NoBatchError, match=words) as found:
        list(delivered(raising(error)))
    assert "\n" not in str(found.value)


@pytest.mark.parametrize(
    "error", [RuntimeError("Caught RuntimeError in DataLoader worker process 0.\nTrace"), RuntimeError("bug")]
)
def test_errors_of_the_program_keep_their_traceback(error):
    with pytest.raises(RuntimeError) as found:
        list(delivered(raising(error)))
    assert found.value is error


def test_workers_that_cannot_be_started_are_one_line(monkeypatch):
    """As without /dev/shm, where no semaphore can be made."""
    with pytest.raises(NoBatchError, match=r"cannot be started .*--shm-size"), workers_starting():
        raise FileNotFoundError(2, "No such file or directory")
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, set())
    assert signal.SIGTERM not in mask


ALONE = """
import numpy as np, os, signal, time
from mimir_fast.data.sources import ArrayImages
from mimir_fast.data import BatchStream
from mimir_fast.data.batch_order import ShuffleSchedule
from mimir_fast.data.datasets import dataset_info
from mimir_fast.data.workers import BatchMaker

class Stuck(ArrayImages):
    def take(self, indices, convert=None):
        print(os.getpid(), flush=True)
        time.sleep(10_000)

source = Stuck(np.zeros((4, 32, 32, 3), np.uint8), np.zeros(4))
stream = BatchStream("stuck", 4, dataset_info("digits"), ShuffleSchedule(4, 2), BatchMaker(source, 32, False, False, 0, 0), 1)
next(stream.epoch(0))
"""


def running(process: int) -> bool:
    """Whether it is there and no zombie."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="asks the kernel of Linux")
def test_workers_do_not_outlive_a_killed_run_even_in_the_middle_of_a_batch():
    """Planted: no parent-death signal: a worker looks for its parent between batches only."""
    child = subprocess.Popen([sys.executable, "-c", ALONE], stdout=subprocess.PIPE, text=True)
    worker = int(child.stdout.readline())
    child.kill()
    child.wait()
    deadline = time.monotonic() + 1800
    while running(worker):
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.slow
def test_spawned_workers_make_the_same_batches(monkeypatch):
    """As on macOS."""
    expected = list(digits().epoch(0))
    monkeypatch.setattr(streams, "START", "spawn")
    stream = digits(num_workers=1)
    found = list(stream.epoch(0))
    stream.close()
    assert all(torch.equal(a, b) for ours, theirs in zip(found, expected, strict=True) for a, b in zip(ours, theirs))
