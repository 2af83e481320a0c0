"""Batches on their way from data workers to the main process: whatever goes wrong there is one line, never a wait for ever.

Batches travel in shared memory (/dev/shm).  Where it is full they go through a pipe, which is slower.
"""

import logging
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import get_worker_info

from mimir_fast.data.errors import NoBatchError

log = logging.getLogger("mimir_fast.data")
# Seconds between two looks at workers that are silent, and after how many of silence they count as stuck.
LOOK, PATIENCE = 5.0, 600.0
# Images uint8 [B,3,S,S], labels int64 [B], and the unreadable files met, path -> reason.
Batch = tuple[Tensor, Tensor, dict[str, str]]
Part = TypeVar("Part", Tensor, np.ndarray)
REMEDY = "docker run --shm-size=8g (or --ipc=host), or fewer --num_workers (0: load in the main process)"


def sent(batch: Batch) -> Batch:
    """A batch as a worker sends it: in shared memory where there is room, else as arrays; in the main process as it is."""
    if get_worker_info() is None:
        return batch
    images, labels, bad = batch
    try:
        # Here and not when it is sent: there an error would be printed by a thread, and the main process wait for ever.
        return images.share_memory_(), labels.share_memory_(), bad
    except RuntimeError:
        return images.numpy(), labels.numpy(), bad  # type: ignore[return-value]


def delivered(batches: Iterator[Batch], interrupted: Callable[[], bool] = lambda: False) -> Iterator[Batch]:
    """The batches of a loader as tensors.

    batches       of a loader whose `timeout` is LOOK if it has workers
    interrupted   asked while workers are silent: whether to stop waiting
    Raises NoBatchError if a worker died, if none delivered for PATIENCE seconds, or if `interrupted` says so.
    """
    told = False
    while True:
        batch = _next(batches, interrupted)
        if batch is None:
            return
        images, labels, bad = batch
        if isinstance(images, np.ndarray):
            if not told:
                log.warning("no room in /dev/shm: batches go through a pipe, which is slower; %s", REMEDY)
            told = True
            images, labels = torch.from_numpy(images), torch.from_numpy(labels)
        yield images, labels, bad


def _next(batches: Iterator[Batch], interrupted: Callable[[], bool]) -> Batch | None:
    silent_since = time.monotonic()
    while True:
        try:
            return next(batches, None)
        except (RuntimeError, OSError, EOFError) as error:
            text = str(error)
            # torch has no class for it: the text alone tells a timeout from other errors.
            if "DataLoader timed out" not in text:
                raise _explained(error) or error from error
        if interrupted():
            raise NoBatchError("stopped while the data workers were silent")
        if time.monotonic() - silent_since > PATIENCE:
            raise NoBatchError(
                f"num_workers: no batch came for {PATIENCE:.0f} s; the workers wait for a disk or a lock: check --data_root (a "
                "network file system that hangs?), try --num_workers 0"
            )


def _explained(error: Exception) -> NoBatchError | None:
    """An error of the transport in one line; None for an error of the program, which keeps its traceback."""
    text = str(error)
    # Of a worker's own code: torch puts the worker's traceback into the message.
    if text.startswith("Caught "):
        return None
    if "DataLoader worker" in text or isinstance(error, (EOFError, ConnectionError)):
        return NoBatchError(
            f"num_workers: a data worker ended ({_first_line(text)}); most often memory ran out and the kernel killed it: "
            "fewer --num_workers, a smaller --batch_size, or more memory"
        )
    if "Too many open files" in text:
        return NoBatchError(
            "num_workers: too many open files; raise the limit (ulimit -n 65536) or take fewer --num_workers"
        )
    if "shared memory" in text or "shm" in text:
        return NoBatchError(f"num_workers: {_first_line(text)}; {REMEDY}")
    return None


def _first_line(text: str) -> str:
    return text.strip().partition("\n")[0].rstrip(". ") or "no message"
