"""The checkpoints in a run's folder: saving, finding the newest, moving aside, removing."""

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from mimir_fast.checkpoints.atomic import move, remove_temporaries, write_atomically
from mimir_fast.checkpoints.errors import CheckpointError
from mimir_fast.checkpoints.reader import Contents, read

# If the newest cannot be read, --resume auto takes the one before it.
KEPT_RESUME_POINTS = 2
BEST_FILE = "best.pth"
EPOCH_FILE = re.compile(r"checkpoint-(\d+)\.pth")
RESUME_FILE = re.compile(r"resume-(\d+)-(\d+)\.pth")


def save_checkpoint(path: Path, state: dict) -> None:
    """Write a checkpoint atomically; raises CheckpointError if that fails, and older checkpoints stay."""
    try:
        write_atomically(path, partial(torch.save, state))
    # torch.save turns the error of a full disk into a RuntimeError.
    except (OSError, RuntimeError) as error:
        reason = str(error.__cause__ or error).partition("\n")[0]
        raise CheckpointError(
            f"output_dir: could not save {path}: {reason}; older checkpoints are intact, make room and go on with --resume auto"
        ) from error


def find_checkpoints(folder: Path) -> list[Path]:
    """Checkpoints in a folder, the one with most progress first.

    checkpoint-E.pth stands at the start of epoch E+1, resume-E-S.pth at micro-step S of epoch E.
    """
    paths = [path for path in (folder.iterdir() if folder.is_dir() else ()) if progress(path) > (-1, 0)]
    # Of equal progress, the end of an epoch before a resume point: it is the file that stays.
    return sorted(paths, key=lambda path: (progress(path), EPOCH_FILE.fullmatch(path.name) is not None), reverse=True)


def progress(path: Path) -> tuple[int, int]:
    """(epoch, micro-step) from which a checkpoint's run continues, by its name; (-1, 0) for other files."""
    if match := EPOCH_FILE.fullmatch(path.name):
        # Saved at the end of its epoch: the run goes on with the next one.
        return int(match[1]) + 1, 0
    if match := RESUME_FILE.fullmatch(path.name):
        return int(match[1]), int(match[2])
    return -1, 0


def supersede(folder: Path, epoch: int, step: int) -> list[Path]:
    """Move checkpoints past a run's starting point into superseded/; returns their old paths."""
    # They belong to an earlier run in the folder, or to what was undone by resuming an older checkpoint, or are damaged:
    # --resume auto must not continue from them.
    past = [path for path in find_checkpoints(folder) if progress(path) > (epoch, step)]
    for path in past:
        move(path, folder / "superseded" / path.name)
    return past


def set_best_aside(folder: Path) -> list[str]:
    """Move an earlier run's best.pth into superseded/, for a run that has no best epoch yet; returns lines to print."""
    path = folder / BEST_FILE
    if not path.exists():
        return []
    move(path, folder / "superseded" / BEST_FILE)
    return [f"output_dir: {path} is an earlier run's and was moved to superseded/"]


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


def clean_folder(folder: Path) -> None:
    """Before a run writes: remove what a kill left behind, temporary files and resume points."""
    remove_temporaries(folder)
    drop_resume_points(folder)


def drop_resume_points(folder: Path) -> None:
    """Remove all but the newest two resume points."""
    resume_points = [path for path in find_checkpoints(folder) if RESUME_FILE.fullmatch(path.name)]
    for path in resume_points[KEPT_RESUME_POINTS:]:
        path.unlink(missing_ok=True)
