"""Cases in a process of their own on a GPU: a crash, or an error that no later call on the GPU survives, costs one case."""

import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

CONTEXT_LOST = 75  # exit status of a worker whose GPU answers no more; its last case is on record
FINISHED = (0, 1, 2, 130)


def supervise(command: list[str], count: int, seconds: float | None, crashed: Callable[[int, int], None]) -> int:
    """Run a worker for `count` cases, and another for the rest as long as one does not finish; returns the exit status.

    The worker gets --first NUMBER, --progress FILE, into which it writes the number of the case that it begins, and what is
    left of the --seconds.  crashed(number, status) is told which case a process did not survive.
    """
    first, worst, ends = 0, 0, None if seconds is None else time.monotonic() + seconds
    with tempfile.TemporaryDirectory() as folder:
        progress = Path(folder) / "number"
        while first < count:
            left = [] if ends is None else ["--seconds", f"{max(ends - time.monotonic(), 0.1):.1f}"]
            own = ["--first", str(first), "--progress", str(progress)]
            status = subprocess.run([*command, *left, *own], check=False).returncode
            if status in FINISHED:
                return max(status, worst)
            worst = 1
            if not progress.exists():  # it did not get as far as the first case
                return 1
            number = int(progress.read_text())
            progress.unlink()
            if status != CONTEXT_LOST:
                crashed(number, status)
            first = number + 1
    return worst


def context_is_dead(device: torch.device) -> bool:
    """Whether an earlier error makes every later call on the GPU fail."""
    if device.type == "cpu":
        return False
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False
