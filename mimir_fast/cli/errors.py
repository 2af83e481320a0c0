"""Errors of a verb: one line on stderr, and the exit status."""

import signal
import sys
import threading
from collections.abc import Callable

from mimir_fast.cli.troubleshooting import reference
from mimir_fast.config.machine import prepare_machine
from mimir_fast.training.failures import described

INTERRUPTED = 130


def complain(prog: str, error: Exception) -> None:
    """Print `prog: error: ...`, one line, with advice where the error itself has none, and where to read more about it."""
    text = described(error) or str(error)
    print(f"{prog}: error: {text}{reference(text)}", file=sys.stderr)


def interrupted(prog: str, text: str) -> int:
    """Print what a Ctrl-C left behind; returns the exit status.  One more Ctrl-C meanwhile changes nothing."""
    in_main = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGINT, signal.SIG_IGN) if in_main else None
    try:
        print(f"{prog}: {text}", file=sys.stderr)
    finally:
        if in_main:
            signal.signal(signal.SIGINT, before)
    return INTERRUPTED


def guarded(prog: str, body: Callable[[], int], stopped: str) -> int:
    """Run a verb's body; returns its exit status, or 2 for wrong input, 1 if disk or memory refused, 130 for Ctrl-C.

    stopped   printed after Ctrl-C: what was saved and how to continue
    """
    prepare_machine()
    try:
        return body()
    except KeyboardInterrupt:
        return interrupted(prog, stopped)
    except Exception as error:
        # Other exceptions are bugs, and keep their tracebacks.
        refused = isinstance(error, OSError) or described(error) is not None
        if not refused and not isinstance(error, ValueError):
            raise
        complain(prog, error)
        return 1 if refused else 2
