"""Checkpoints: the original's format, written so that a kill or a full disk never spoils one."""

import argparse
import os
import pickle
import re
import warnings
from pathlib import Path

import torch

KEPT_RESUME_POINTS = 2
EPOCH_FILE = re.compile(r"checkpoint-(\d+)\.pth")
RESUME_FILE = re.compile(r"resume-(\d+)-(\d+)\.pth")


class CheckpointError(ValueError):
    """A checkpoint that cannot be written, read or used; one line that names the file and what to do."""


def save_checkpoint(path: Path, state: dict) -> None:
    """Write to a temporary file, flush, fsync, rename: under the final name there is a whole file or the previous one.

    Raises CheckpointError if the disk refuses; the temporary file is removed and older checkpoints stay.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except (OSError, RuntimeError) as error:
        temporary.unlink(missing_ok=True)
        raise CheckpointError(
            f"output_dir: could not save {path}: {error}; older checkpoints are intact, make room and go on with --resume auto"
        ) from error


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def load_checkpoint(source: str | Path) -> dict:
    """Read a checkpoint of ours or of the original, from a path or an https URL, onto the CPU.

    Only tensors, plain values and argparse.Namespace are accepted.  Raises CheckpointError if the file is missing,
    truncated, wants to run other code, or holds no model.
    """
    source = str(source)
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            if source.startswith(("https://", "http://")):
                state = torch.hub.load_state_dict_from_url(source, map_location="cpu", weights_only=True)
            else:
                state = torch.load(source, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise CheckpointError(f"resume: no file {source}") from error
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"resume: {source} is refused: it is damaged, or holds more than tensors and plain values ({_first_line(error)})"
        ) from error
    except (OSError, RuntimeError, EOFError, ValueError) as error:
        raise CheckpointError(f"resume: {source} is damaged or no checkpoint ({_first_line(error)})") from error
    if not isinstance(state, dict) or not isinstance(state.get("model"), dict):
        raise CheckpointError(f"resume: {source} holds no 'model' entry")
    return state


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def find_checkpoints(folder: Path) -> list[Path]:
    """Checkpoints in a folder, the one with most progress first.

    checkpoint-E.pth stands at the start of epoch E+1, resume-E-S.pth at micro-step S of epoch E.
    """
    progress = {}
    for path in folder.iterdir() if folder.is_dir() else ():
        if match := EPOCH_FILE.fullmatch(path.name):
            progress[path] = (int(match[1]) + 1, 0, 1)
        elif match := RESUME_FILE.fullmatch(path.name):
            progress[path] = (int(match[1]), int(match[2]), 0)
    return sorted(progress, key=progress.get, reverse=True)


def load_newest(folder: Path, log=print) -> tuple[Path, dict] | None:
    """The newest readable checkpoint of a folder, or None if it has none; damaged ones are named through `log`.

    Raises CheckpointError if there are checkpoints but none can be read.
    """
    candidates = find_checkpoints(folder)
    for path in candidates:
        try:
            return path, load_checkpoint(path)
        except CheckpointError as error:
            log(f"{error}; trying the checkpoint before it")
    if candidates:
        raise CheckpointError(f"resume: none of the {len(candidates)} checkpoints in {folder} can be read")
    return None


def clean_folder(folder: Path) -> None:
    """Remove temporary files that a kill left behind, and all but the newest two resume points."""
    for stale in folder.glob("*.pth.tmp"):
        stale.unlink(missing_ok=True)
    resume_points = [path for path in find_checkpoints(folder) if RESUME_FILE.fullmatch(path.name)]
    for path in resume_points[KEPT_RESUME_POINTS:]:
        path.unlink(missing_ok=True)


def load_model_state(model: torch.nn.Module, state: dict, source: str) -> None:
    """Strictly load the model's parameters; raises CheckpointError listing what is missing, unexpected or misshapen."""
    own, given = model.state_dict(), state["model"]
    missing, unexpected = own.keys() - given.keys(), given.keys() - own.keys()
    shapes = [
        f"{k} {tuple(given[k].shape)} for {tuple(own[k].shape)}"
        for k in own
        if k in given and own[k].shape != given[k].shape
    ]
    if missing or unexpected or shapes:
        words = [f"{len(missing)} missing keys", f"{len(unexpected)} unexpected keys", f"{len(shapes)} other shapes"]
        examples = [*sorted(missing)[:2], *sorted(unexpected)[:2], *shapes[:2]]
        raise CheckpointError(
            f"resume: {source} belongs to another model: {', '.join(words)} (e.g. {'; '.join(examples)}); "
            "check --model, --input_size and --patch_size"
        )
    model.load_state_dict(given, strict=True)


def load_optimizer_state(optimizer: torch.optim.Optimizer, state: dict, source: str) -> None:
    """Restore AdamW's moments; how updates are computed (fused, foreach, capturable) stays this run's own."""
    own = ("fused", "foreach", "capturable", "differentiable", "maximize", "amsgrad")
    kept = [{key: group[key] for key in own if key in group} for group in optimizer.param_groups]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            optimizer.load_state_dict(state)
    except (ValueError, KeyError) as error:
        raise CheckpointError(f"resume: the optimizer state of {source} does not fit this model: {error}") from error
    for group, values in zip(optimizer.param_groups, kept):
        group.update(values)
