"""A lock on a folder: two programs that write to one folder would mix their files.

The lock is a file that names its owner: host, process, since when.  It is taken over when the owner is dead.  On the owner's
machine that is known at once; on another machine, with the folder on a shared file system, when the owner has not touched the
file for a while.  No lock of the operating system's is used: many shared file systems ignore them.
"""

import contextlib
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

NAME = "run.lock"
# Seconds between two touches, and after how many without one an owner on another machine counts as dead.
BEAT, PATIENCE = 15.0, 90.0


class FolderInUseError(ValueError):
    """A folder that another program is writing to; one line that names it."""


@contextmanager
def locked(folder: Path, flag: str = "output_dir", say: Callable[[str], None] = print) -> Iterator[None]:
    """Context in which this process alone writes to a folder, which is made.

    flag   the flag that chose the folder, for messages
    Raises FolderInUseError if another program does, OSError if the lock cannot be written.
    """
    path, mine = folder / NAME, _describe_self()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        while not _created(path, mine):
            _take_over(path, flag, say)
    except OSError as error:
        raise OSError(f"{flag}: could not write {path}: {error}") from error
    ended = threading.Event()
    threading.Thread(target=_beat, args=(path, mine["token"], ended), daemon=True).start()
    try:
        yield
    finally:
        ended.set()
        # Another program may have taken it over, from a process that was suspended for longer than PATIENCE.
        if _owner(path).get("token") == mine["token"]:
            with contextlib.suppress(OSError):
                path.unlink()


def _describe_self() -> dict:
    return {
        "host": socket.gethostname(),
        "process": os.getpid(),
        "since": time.strftime("%Y-%m-%d %H:%M:%S"),
        "machine": _machine(),
        "started": _started(os.getpid()),
        # Numbers of processes come again; this one tells whether a lock is still the same.
        "token": uuid.uuid4().hex,
    }


def _created(path: Path, mine: dict) -> bool:
    try:
        # O_EXCL: of several programs one succeeds, over NFS too from its version 3 on.
        descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
    except FileExistsError:
        return False
    try:
        os.write(descriptor, json.dumps(mine).encode())
    finally:
        os.close(descriptor)
    return True


def _take_over(path: Path, flag: str, say: Callable[[str], None]) -> None:
    """Remove the lock of a dead owner.  Raises FolderInUseError if the owner lives."""
    owner = _owner(path)
    if not _is_dead(path, owner, say):
        who = f"process {owner.get('process', 'unknown')} on {owner.get('host', 'unknown')}"
        since = f" since {owner['since']}" if "since" in owner else ""
        raise FolderInUseError(
            f"{flag}: {path.parent} is in use by {who}{since}; take another {flag}, or end that program first"
        )
    # Moved away and looked at again: another program may have taken it over in between.
    moved = path.with_name(f"{NAME}.{uuid.uuid4().hex}.tmp")
    with contextlib.suppress(FileNotFoundError):
        os.rename(path, moved)
        if _owner(moved) != owner:
            os.rename(moved, path)
        moved.unlink(missing_ok=True)


def _is_dead(path: Path, owner: dict, say: Callable[[str], None]) -> bool:
    if owner and owner.get("machine") == _machine():
        return _started(owner["process"]) != owner["started"]
    # Its clock may differ: what counts is whether the file's time changes while this machine's clock runs.
    who, before = f"process {owner.get('process')} on {owner.get('host')}", _touched(path)
    if owner:
        say(f"output_dir: {path.parent} was locked by {who}; waiting up to {PATIENCE:.0f} s for a sign of life")
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        if _touched(path) != before or _owner(path) != owner:
            return False
        time.sleep(min(1.0, PATIENCE / 10))
    return True


def _touched(path: Path) -> int | None:
    # Of the open file: on network file systems a path's attributes come from a cache.
    with contextlib.suppress(OSError), open(path, "rb") as file:
        return os.fstat(file.fileno()).st_mtime_ns
    return None


def _owner(path: Path) -> dict:
    """What a lock says; empty if it is gone, cut or no lock of ours."""
    try:
        owner = json.loads(path.read_bytes())
        return owner if {"host", "process", "machine", "started", "token"} <= owner.keys() else {}
    except (OSError, ValueError, AttributeError):
        return {}


def _beat(path: Path, token: str, ended: threading.Event) -> None:
    while not ended.wait(BEAT) and _owner(path).get("token") == token:
        with contextlib.suppress(OSError):
            os.utime(path)


def _machine() -> str:
    """Where process numbers mean the same: host, boot, and on Linux the container."""
    boot = namespace = ""
    with contextlib.suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
        namespace = os.readlink("/proc/self/ns/pid")
    return f"{socket.gethostname()} {boot} {namespace}"


def _started(process: int) -> str | None:
    """When a process of this machine began, in the kernel's words; None if there is none (a zombie is none)."""
    try:
        # The program's name stands in brackets and may hold brackets and blanks: counting begins after the last one.
        state, *fields = Path(f"/proc/{process}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
        return None if state == "Z" else fields[18]
    except FileNotFoundError:
        if Path("/proc/self/stat").exists():
            return None
    except OSError:
        return None
    # Without /proc (macOS) the number alone must do.
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        pass
    return "running"
