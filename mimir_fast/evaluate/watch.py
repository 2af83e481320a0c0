"""Watching over the processes of an evaluation, which for hours do not wait for each other.

A process that ends with an error says why at the place where the processes met; one that ends without a word (killed, its
machine lost) is missed when its beats stop.  Either ends all others within a minute.
"""

import _thread
import contextlib
import os
import sys
import threading
import time

import torch.distributed as dist

from mimir_fast.training.failures import described, lost_peer

# Seconds between two beats, after how many without one a process counts as dead, and how long the main thread may take to end.
# Together less than a minute.
BEAT, PATIENCE, GRACE = 3.0, 40.0, 10.0
REASON = "evaluation: why it ends"
GO_ON = "; finished batches are saved, the same command goes on"


class PeerError(ConnectionError):
    """Another process of the evaluation ended; one line that says which and why."""


def _in_words(error: BaseException) -> str:
    """An error in one line: our own errors as they are, others with their type."""
    if isinstance(error, KeyboardInterrupt):
        return "stopped by Ctrl-C"
    said = isinstance(error, (ValueError, OSError))
    return (str(error) if said else f"{type(error).__name__} {error}").partition("\n")[0]


class Watch:
    """A thread that beats for this process and watches the beats of the others.

    store   where the processes met
    lost    which other process ended, and why; empty while all live
    """

    def __init__(self, store: dist.Store, rank: int, size: int):
        self.rank, self.size, self.lost = rank, size, ""
        self._store, self._ended = store, threading.Event()
        # A daemon: a process whose main thread has ended must not live on to send beats.
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()

    def counted(self, turn: int, done: int, broken: int) -> tuple[int, int]:
        """Add to the images that this process has finished in a turn, and how many of them were broken; on rank 0 returns both
        sums over the others."""
        mine = (0, 0) if self.rank == 0 else (done, broken)
        # A counter per turn: none could be set back to zero between rounds while others add to it already.
        sums = [self._store.add(f"evaluation: {turn} {what}", n) for what, n in zip(("done", "broken"), mine)]
        return sums[0], sums[1]

    def ends(self, error: BaseException) -> BaseException:
        """The error with which this process ends; tells the others if it is its own."""
        reason = self.lost
        if not reason and lost_peer(error):
            # The other one is gone already; if it ended by itself it said why before.
            reason = self._reason() or "another process ended without a word"
        if reason:
            return PeerError(reason + GO_ON)
        # Before the reason is told: this process's own watch would find it there and interrupt the telling.
        self.stop()
        self._tell(described(error) or _in_words(error))
        return error

    def stop(self) -> None:
        """End the thread: nobody is missed any more."""
        self._ended.set()
        self._thread.join()

    def _tell(self, why: str) -> None:
        # The first reason stays: those of others may be its consequences.
        with contextlib.suppress(dist.DistError):
            self._store.compare_set(REASON, "", f"process {self.rank} of {self.size}: {why}")
            deadline = time.monotonic() + 3 * BEAT
            # Without torchrun the place where they met ends with process 0, and the reason with it.
            while self.rank == 0 and self._store.add("evaluation: heard", 0) < self.size - 1:
                if time.monotonic() > deadline:
                    break
                time.sleep(0.1)

    def _look(self) -> None:
        beats, seen = [0] * self.size, [time.monotonic()] * self.size
        while not self._ended.wait(BEAT):
            self.lost = self._missing(beats, seen)
            if self.lost:
                # As Ctrl-C does: at the next line of Python.
                _thread.interrupt_main()
                if not self._ended.wait(GRACE):
                    print(f"error: {self.lost}{GO_ON}", file=sys.stderr, flush=True)
                    # Not sys.exit, which ends this thread alone: the main one may hang where no exception helps.
                    os._exit(1)
                return

    def _missing(self, beats: list[int], seen: list[float]) -> str:
        """Which process ended and why; empty if all live."""
        try:
            self._store.add(f"evaluation: beat {self.rank}", 1)
            if reason := self._reason():
                self._store.add("evaluation: heard", 1)
                return reason
            # Beats are counters and carry no time, so that clocks of several machines are never compared.
            now = time.monotonic()
            for rank in range(self.size):
                # Adding 0 reads a counter that need not exist yet; `get` would wait for its first beat.
                count = self._store.add(f"evaluation: beat {rank}", 0)
                if count != beats[rank]:
                    beats[rank], seen[rank] = count, now
                elif now - seen[rank] > PATIENCE:
                    return f"process {rank} of {self.size} ended without a word or hangs (was it killed?)"
        # The store is process 0's, or torchrun's on the same machine: where it does not answer, that is gone.
        except dist.DistError:
            return f"process 0 of {self.size} ended without a word (was it killed?)"
        return ""

    def _reason(self) -> str:
        """What the first process that ended by an error said; empty if none did."""
        with contextlib.suppress(dist.DistError):
            # `get` alone would wait for a key that is not there until the store's timeout.
            return self._store.get(REASON).decode() if self._store.check([REASON]) else ""
        return f"process 0 of {self.size} ended without a word (was it killed?)"
