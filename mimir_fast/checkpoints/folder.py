"""The checkpoints in a run's folder: saving, finding the newest, moving aside, removing."""

import re
import shutil
import zipfile
from collections.abc import Callable
from functools import partial
from itertools import count
from pathlib import Path

import torch

from mimir_fast.checkpoints.atomic import free_name, move, write_atomically
from mimir_fast.checkpoints.errors import CheckpointError
from mimir_fast.checkpoints.reader import Contents, read

# If the newest cannot be read, --resume auto takes the one before it.
KEPT_RESUME_POINTS = 2
BEST_FILE = "best.pth"
LOGS = ("metrics.jsonl", "log.txt")
EPOCH_FILE = re.compile(r"checkpoint-(\d+)\.pth")
RESUME_FILE = re.compile(r"resume-(\d+)-(\d+)\.pth")


def save_checkpoint(path: Path, state: dict) -> None:
    """Write a checkpoint atomically; raises CheckpointError if that fails, and older checkpoints stay."""
    try:
        write_atomically(path, partial(torch.save, state))
    # torch.save turns the error of a full disk into a RuntimeError.
    except (OSError, RuntimeError) as error:
        reason = str(error.__cause__ or error).partition("\n")[0]
        raise CheckpointError(f"output_dir: could not save {path}: {reason}; {_what_is_left(path.parent)}") from error


def _what_is_left(folder: Path) -> str:
    """What a run can go on from after a checkpoint could not be written."""
    try:
        left = find_checkpoints(folder)
    except OSError:
        left = []
    if not left:
        return f"{folder} holds no older checkpoint" if folder.is_dir() else f"the folder {folder} is gone"
    return f"older checkpoints are intact (newest: {left[0].name}), make room and go on with --resume auto"


def find_checkpoints(folder: Path) -> list[Path]:
    """Checkpoints in a folder, the one with most progress first.

    checkpoint-E.pth stands at the start of epoch E+1, resume-E-S.pth at micro-step S of epoch E; of two that stand at the same
    place the resume point is the later one: an epoch that was interrupted begins again from it.
    """
    paths = [path for path in (folder.iterdir() if folder.is_dir() else ()) if progress(path) > (-1, 0)]
    return sorted(paths, key=lambda path: (progress(path), RESUME_FILE.fullmatch(path.name) is not None), reverse=True)


def progress(path: Path) -> tuple[int, int]:
    """(epoch, micro-step) from which a checkpoint's run continues, by its name; (-1, 0) for other files."""
    if match := EPOCH_FILE.fullmatch(path.name):
        # Saved at the end of its epoch: the run goes on with the next one.
        return int(match[1]) + 1, 0
    if match := RESUME_FILE.fullmatch(path.name):
        return int(match[1]), int(match[2])
    return -1, 0


def beyond(folder: Path, epoch: int, step: int) -> list[Path]:
    """Checkpoints past a run's position."""
    # They belong to an earlier run in the folder, or to what was undone by resuming an older checkpoint, or are damaged:
    # --resume auto must not continue from them.
    return [path for path in find_checkpoints(folder) if progress(path) > (epoch, step)]


def supersede(folder: Path, epoch: int, step: int) -> list[str]:
    """Move checkpoints past a run's position into superseded/, with copies of the logs; returns lines to print.

    Call it when the checkpoint of this position is on the disk: until then they are what a killed run goes on from.
    """
    past = beyond(folder, epoch, step)
    if not past:
        return []
    target = _aside(folder, [path.name for path in past])
    target.mkdir(exist_ok=True)
    for name in LOGS:
        if (folder / name).exists():
            # Copies: the run goes on writing into the logs themselves.
            shutil.copy2(folder / name, free_name(target / name))
    for path in past:
        move(path, target / path.name)
    return [f"output_dir: {path} is past this run's start and was moved to {target.name}/" for path in past]


def set_best_aside(folder: Path, best: list[float] | None) -> list[str]:
    """Move a best.pth that is not this run's best epoch into superseded/; returns lines to print.

    best   what the run says of its best epoch; None: it has none yet.  A file of another one is an earlier run's, or of an
           epoch past this run's start.
    """
    path = folder / BEST_FILE
    if not path.exists() or (best is not None and _best_of(path) == best):
        return []
    target = _aside(folder, [BEST_FILE])
    move(path, target / BEST_FILE)
    lost = "" if best is None else "; the best epoch so far has no file until a better one comes"
    return [f"output_dir: {path} is not of this run's past and was moved to {target.name}/{lost}"]


def _best_of(path: Path) -> list[float] | None:
    """What a best.pth says of its epoch; None if it cannot be read."""
    try:
        return read(path, "resume").entries.get("mimir_fast", {}).get("best")
    except CheckpointError:
        return None


def _aside(folder: Path, names: list[str]) -> Path:
    """The first of superseded, superseded.2, ... that has none of these files."""
    numbered = (folder / ("superseded" if number == 1 else f"superseded.{number}") for number in count(1))
    return next(target for target in numbered if not any((target / name).exists() for name in names))


def read_newest(folder: Path, say: Callable[[str], None] = print) -> Contents | None:
    """The newest readable checkpoint of a folder, or None if it has none; damaged ones are named through `say`.

    Raises CheckpointError if there are checkpoints but none can be read.
    """
    candidates = find_checkpoints(folder)
    for path in candidates:
        try:
            return read(path, "resume")
        except CheckpointError as error:
            say(f"{error}; trying the checkpoint before it")
    if candidates:
        raise CheckpointError(f"resume: none of the {len(candidates)} checkpoints in {folder} can be read")
    return None


def drop_resume_points(folder: Path) -> None:
    """Remove all but the newest two resume points, if these can be read as far as their table of contents tells."""
    resume_points = [path for path in find_checkpoints(folder) if RESUME_FILE.fullmatch(path.name)]
    if all(zipfile.is_zipfile(path) for path in resume_points[:KEPT_RESUME_POINTS]):
        for path in resume_points[KEPT_RESUME_POINTS:]:
            path.unlink(missing_ok=True)
