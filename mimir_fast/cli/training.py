"""Verbs that train: from command-line words to the exit status."""

import sys
from collections.abc import Callable

from mimir_fast.checkpoints.errors import CheckpointError
from mimir_fast.cli.errors import complain, interrupted
from mimir_fast.cli.parser import Command, parse_args
from mimir_fast.config.machine import prepare_machine
from mimir_fast.config.resolve import Config, Run, resolve
from mimir_fast.data import DataError
from mimir_fast.training.distributed import World
from mimir_fast.training.failures import described
from mimir_fast.training.running import Runs, running

# Errors of the disk or the data while a run is under way: exit status 1.
RUN_ERRORS = (CheckpointError, DataError, OSError)


def train(
    command: Command[Config],
    argv: list[str] | None,
    build: Callable[[Run[Config], World], Runs],
    instead: Callable[[Run[Config]], int | None] | None = None,
) -> int:
    """Run a training; returns the exit status: 0 done or stopped by SIGTERM, 1 failed, 2 wrong input, 130 Ctrl-C.

    instead: what flags may ask for in place of a training; returns its exit status, or None to train
    """
    began, words = False, sys.argv[1:] if argv is None else argv
    prepare_machine()
    try:
        run = resolve(*parse_args(command, words))
        if instead and (status := instead(run)) is not None:
            return status
        with running(run, build) as loop:
            began = True
            return loop.run()
    # Before the loop handles signals itself, or a second Ctrl-C.
    except KeyboardInterrupt:
        at_once = "stopped at once; --resume auto goes on from the last checkpoint"
        return interrupted(command.prog, at_once if began else "stopped before the first update")
    except Exception as error:
        refused = isinstance(error, RUN_ERRORS) or described(error) is not None
        # Once training has begun, a ValueError is a bug and not wrong input.
        if not refused and (began or not isinstance(error, ValueError)):
            raise
        complain(command.prog, error)
        return 1 if began else 2
