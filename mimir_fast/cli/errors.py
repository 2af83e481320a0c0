"""Errors of a verb: one line on stderr, and the exit status."""

import sys
from collections.abc import Callable

import torch

from mimir_fast.checkpoints.errors import CheckpointError
from mimir_fast.config.machine import prepare_machine
from mimir_fast.data import DataError

# Errors of the disk, the memory or the data while a run is under way: exit status 1.
RUN_ERRORS = (CheckpointError, DataError, OSError, torch.OutOfMemoryError)


def complain(prog: str, error: Exception) -> None:
    """Print `prog: error: ...`, one line, with advice where the error itself has none."""
    text = str(error)
    # torch's message is a paragraph about its allocator and names no flag.
    if isinstance(error, torch.OutOfMemoryError):
        first = text.split(". ")[0].splitlines()[0]
        text = f"batch_size: {first}; pass a smaller one, with --accum_iter or --activation_checkpointing where there is one"
    print(f"{prog}: error: {text}", file=sys.stderr)


def guarded(prog: str, body: Callable[[], int], stopped: str) -> int:
    """Run a verb's body; returns its exit status, or 2 for wrong input, 1 if disk or memory refused, 130 for Ctrl-C.

    stopped   printed after Ctrl-C: what was saved and how to continue
    """
    prepare_machine()
    # Other exceptions are bugs, and keep their tracebacks.
    try:
        return body()
    except ValueError as error:
        complain(prog, error)
        return 2
    except (OSError, torch.OutOfMemoryError) as error:
        complain(prog, error)
        return 1
    except KeyboardInterrupt:
        print(f"{prog}: {stopped}", file=sys.stderr)
        return 130
