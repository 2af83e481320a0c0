"""The study's results: one file of JSON lines, a row for every job that is done."""

import fcntl
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mimir_fast.checkpoints.atomic import write_text_atomically


def read_rows(path: Path) -> list[dict]:
    """The rows of a results file, none if it does not exist."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def add_row(path: Path, row: dict) -> None:
    """Add a row, unless its job has one.  After a kill the file is as before, or has the whole row."""
    with holding(path.with_suffix(".lock"), wait=True):
        rows = read_rows(path)
        if row["job"] not in {other["job"] for other in rows}:
            write_text_atomically(path, "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in [*rows, row]))


@contextmanager
def holding(path: Path, wait: bool = False) -> Iterator[bool]:
    """Context that holds a lock, which ends with the process, however that ends; yields whether it does.

    wait   until the lock is free; else False means that another process holds it
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
        else:
            yield True
