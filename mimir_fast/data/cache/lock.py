"""A lock on a folder that is being written: held by one process of all machines that share the file system."""

import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mimir_fast.data.errors import DataError


@contextmanager
def locked(path: Path, flag: str, wait: bool = False) -> Iterator[None]:
    """Context in which this process alone holds the lock `path`, a file beside what is written, which is removed at the end.

    flag   the flag that chose the folder, for messages
    wait   wait for another holder; else raise DataError, which names its host and process
    The system releases the lock of a process that dies.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = _acquired(path, flag, wait)
    try:
        os.truncate(descriptor, 0)
        os.pwrite(descriptor, f"{socket.gethostname()}, process {os.getpid()}".encode(), 0)
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(descriptor)


def _acquired(path: Path, flag: str, wait: bool) -> int:
    """The descriptor of the locked file."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            # The holder before may have removed the file that was waited for: then the lock is on another one.
            if path.exists() and os.fstat(descriptor).st_ino == path.stat().st_ino:
                return descriptor
        except BlockingIOError:
            holder = os.pread(descriptor, 200, 0).decode(errors="replace") or "another process"
            os.close(descriptor)
            raise DataError(f"{flag}: {path.parent} is being written by {holder}; wait for it or stop it") from None
        except OSError as error:
            os.close(descriptor)
            raise OSError(
                f"{flag}: could not lock {path}: {error.strerror}; choose a file system with locks"
            ) from error
        os.close(descriptor)
