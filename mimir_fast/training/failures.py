"""Errors of the machine, not of the program: memory that ran out, a process of the same run that is gone; each in one line."""

import traceback
from collections.abc import Callable

import torch

from mimir_fast.checkpoints.errors import CheckpointError
from mimir_fast.data.errors import DataError

# What torch's allocators of host memory, and Python's threads, say in RuntimeErrors.
HOST_MEMORY = (
    "can't allocate memory",
    "not enough memory: you tried to allocate",
    "bad_alloc",
    "can't start new thread",
)
# What gloo, NCCL and the store say when another process ended.
LOST_PEER = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
    "remote process exited",
    "Timed out waiting",
    "timed out connecting",
)
TRANSPORT = ("gloo", "nccl", "tcpstore", "store")


def out_of_memory(error: BaseException) -> str | None:
    """What to do about an error if memory ran out, in one line; else None."""
    if isinstance(error, MemoryError) or any(words in str(error) for words in HOST_MEMORY):
        return (
            "batch_size: host memory ran out; pass a smaller one, fewer --num_workers, or give the program more memory"
        )
    if not isinstance(error, torch.OutOfMemoryError):
        return None
    # torch's message is a paragraph about its allocator and names no flag.
    first = str(error).split(". ")[0].splitlines()[0]
    return (
        f"batch_size: {first}; pass a smaller one, with --accum_iter or --activation_checkpointing where there is one"
    )


def lost_peer(error: BaseException) -> str | None:
    """A line if another process of the run ended or does not answer; else None."""
    text = str(error)
    told = isinstance(error, torch.distributed.DistError) if torch.distributed.is_available() else False
    heard = any(words in text for words in LOST_PEER) and any(words in text.lower() for words in TRANSPORT)
    if not (told or (isinstance(error, RuntimeError) and heard)):
        return None
    first = text.partition("\n")[0][:200]
    return f"another process of this run ended or does not answer, its own message says why ({first}); go on with --resume auto"


def described(error: BaseException) -> str | None:
    """An error of the machine in one line; None for all others."""
    return out_of_memory(error) or lost_peer(error)


def rescue(error: Exception, possible: bool, save: Callable[[], None], say: Callable[[str], None]) -> None:
    """Save what a run has done so far, where it ends by an error of the data or the machine and it is possible; says so."""
    if not possible or not (isinstance(error, DataError) or described(error)):
        return
    # The frames of the error hold the tensors of a whole step: without them there is memory to save with.
    traceback.clear_frames(error.__traceback__)
    try:
        save()
        say("the state after the last update was saved; go on with --resume auto")
    except (CheckpointError, MemoryError, RuntimeError) as second:
        first = str(second).partition("\n")[0]
        say(f"warning: the state could not be saved ({first}); --resume auto goes on from the last checkpoint")
