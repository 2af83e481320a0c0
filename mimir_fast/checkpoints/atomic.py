"""Atomic writing: after a kill a file is the previous one or the new one, never a part.

A file is written under a temporary name beside it, flushed, fsynced and renamed; then its folder is fsynced.
"""

import errno
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import BinaryIO

TEMPORARY = re.compile(r".+\.tmp(\.\w+)?")
# Errors of file systems that have no fsync at all, such as some of FUSE's.
NO_FSYNC = (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS)
# Errors of file systems that cannot fsync a folder, such as CIFS and FUSE; the rename itself has happened.
UNSYNCABLE = (*NO_FSYNC, errno.EACCES, errno.EPERM)


def write_atomically(path: Path, write: Callable[[BinaryIO], object], flag: str = "output_dir") -> None:
    """Replace `path` by what write(file) writes into a binary file; a missing folder is made.

    flag   the flag that chose the folder, for the message
    Raises OSError naming flag and file if writing fails; after any exception the previous file is as it was.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with in_place_when_done(path) as (temporary,), open(temporary, "wb") as file:
            write(file)
    except OSError as error:
        raise OSError(f"{flag}: could not write {path}: {error}") from error


def write_text_atomically(path: Path, text: str, flag: str = "output_dir") -> None:
    """Replace `path` by a text in UTF-8, paths of any bytes included; see write_atomically."""
    write_atomically(path, lambda file: file.write(text.encode(errors="surrogateescape")), flag)


def append_text(path: Path, text: str, flag: str = "output_dir") -> None:
    """Append whole lines in UTF-8 to a file, on the disk when it returns; a kill may cut the last of them.

    Raises OSError naming flag and file if that fails; the file is then as long as before.
    """
    try:
        # Unbuffered: what a failed write leaves in a buffer would be written once more when the file is closed.
        with open(path, "ab", buffering=0) as file:
            length, rest = os.fstat(file.fileno()).st_size, memoryview(text.encode(errors="surrogateescape"))
            try:
                # A nearly full disk takes a part at a time.
                while rest:
                    rest = rest[file.write(rest) :]
                _fsync(file.fileno())
            except OSError:
                # Half a line would become one with the next that is appended.
                os.truncate(path, length)
                raise
    except OSError as error:
        raise OSError(f"{flag}: could not write {path}: {error}") from error


@contextmanager
def in_place_when_done(*paths: Path, keep_suffix: bool = False) -> Iterator[list[Path]]:
    """Context with temporary files that become `paths` at its end, or are removed after an exception.

    keep_suffix   call them NAME.PROCESS.tmp.SUFFIX, for libraries that choose the format by the suffix; else
                  NAME.SUFFIX.PROCESS.tmp, which no pattern for finished files matches
    """
    # With the process in the name: two programs may write one file, of which either is then whole.
    own = f"{os.getpid()}.tmp"
    temporary = [
        path.with_name(f"{path.stem}.{own}{path.suffix}" if keep_suffix else f"{path.name}.{own}") for path in paths
    ]
    try:
        yield temporary
        # Content before name: a file system may write the rename to disk first, and a power cut leave an empty file.
        for path in temporary:
            _sync(path)
        # All contents are on the disk by now: files that belong together change names in one go.
        for ours, final in zip(temporary, paths):
            os.replace(ours, final)
        for folder in {path.parent for path in paths}:
            _sync_folder(folder)
    finally:
        for path in temporary:
            path.unlink(missing_ok=True)


def move(path: Path, target: Path) -> None:
    """Rename a file or folder, durably; the target's folder is made.  Raises OSError if that fails."""
    target.parent.mkdir(parents=True, exist_ok=True)
    os.replace(path, target)
    # Both folders: the entry that is gone and the one that is new.
    for folder in {path.parent, target.parent}:
        _sync_folder(folder)


def free_name(path: Path) -> Path:
    """The path itself, or with the first number from 2 on behind it that no file or folder has: NAME, NAME.2, NAME.3."""
    candidates = (path.with_name(f"{path.name}.{number}") for number in count(2))
    return path if not path.exists() else next(candidate for candidate in candidates if not candidate.exists())


def remove_temporaries(folder: Path) -> None:
    """Remove the temporary files that a kill left in a folder."""
    for path in folder.iterdir():
        if TEMPORARY.fullmatch(path.name):
            path.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    # Open for writing: not every system fsyncs a file that is open for reading alone.
    with open(path, "rb+") as file:
        _fsync(file.fileno())


def _fsync(descriptor: int) -> None:
    """fsync of a file.  Raises OSError if the disk refuses; file systems that have no fsync write when they like."""
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in NO_FSYNC:
            raise


def _sync_folder(folder: Path) -> None:
    try:
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        if error.errno not in UNSYNCABLE:
            raise
