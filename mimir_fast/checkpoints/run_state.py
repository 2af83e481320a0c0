"""State of a run: its position, what a checkpoint holds, and resuming.

Every random draw of the loader and of the step is a function of (seed, rank, epoch, step), so the position is the state
of every random generator.
"""

import argparse
import signal
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
import yaml
from torch import nn

from mimir_fast.checkpoints import folder as ckpt
from mimir_fast.checkpoints.atomic import (
    free_name,
    remove_temporaries,
    write_atomically,
    write_text_atomically,
)
from mimir_fast.checkpoints.errors import CheckpointError
from mimir_fast.checkpoints.matching import load_model_state, load_optimizer_state
from mimir_fast.checkpoints.reader import read
from mimir_fast.config.sections import RunConfig
from mimir_fast.training.distributed import World
from mimir_fast.training.optimizer import Updater

# Written where nothing is scaled: the original resumes with an enabled GradScaler, which refuses an empty state.
FRESH_SCALER = {
    "scale": 65536.0,
    "growth_factor": 2.0,
    "backoff_factor": 0.5,
    "growth_interval": 2000,
    "_growth_tracker": 0,
}


@dataclass
class Position:
    """Position of a run: its next micro-step `step` of `epoch`, `update` optimizer updates done, and the epoch's sums."""

    epoch: int = 0
    step: int = 0
    update: int = 0
    sums: dict[str, float] = field(default_factory=dict)


def checkpoint_state(
    weights: dict,
    moments: dict,
    updater: Updater,
    position: Position,
    flat: dict,
    lr: float,
    dataset: str,
    own: dict,
) -> dict:
    """The original's five entries, and ours under `mimir_fast`; only tensors, plain values and the args Namespace.

    As in the original, args holds eps and alpha divided by 255, the learning rate used and the data set's full name.
    weights, moments   state dicts of the whole model and its optimizer
    flat               the run's flags as recorded
    own                what else a run of this kind needs to resume, with `geometry`: what a position inside an epoch depends on
    """
    flat = flat | {"eps": flat["eps"] / 255, "alpha": flat["alpha"] / 255, "lr": lr, "dataset": dataset}
    return {
        "model": weights,
        "optimizer": moments,
        # The original resumes at epoch + 1.
        "epoch": position.epoch - 1,
        "scaler": updater.scaler.state_dict() or FRESH_SCALER,
        "args": argparse.Namespace(**flat),
        "mimir_fast": asdict(position) | {"counters": updater.counters.tolist()} | own,
    }


def find_state(resume: str, folder: Path | None, say: Callable[[str], None]) -> tuple[str, dict] | None:
    """The state that --resume names, with the file's name; None to start from the beginning.

    Raises ValueError for 'auto' without an output_dir, CheckpointError if the file cannot be used.
    """
    if not resume:
        return None
    if resume != "auto":
        found = read(resume, "resume")
    elif folder is None:
        raise ValueError("resume: 'auto' looks into output_dir, which is empty")
    elif (newest := ckpt.read_newest(folder, say)) is None:
        say(f"resume: no checkpoint in {folder}, starting from the beginning")
        return None
    else:
        found = newest
    for line in found.left_aside:
        say(f"resume: {line}")
    return found.file, found.state


def restore(
    state: dict,
    source: str,
    model: nn.Module,
    updater: Updater,
    start: Position,
    geometry: list[int],
    updates_per_epoch: int,
    say: Callable[[str], None],
    images: str = "",
) -> tuple[Position, dict]:
    """Load a checkpoint of ours or of the original; returns the position and our own entry, empty if there is none.

    start   the position if the checkpoint holds parameters only
    images  fingerprint of the training images' names and labels, which a position inside an epoch depends on too
    """
    load_model_state(model, state, source)
    if "optimizer" not in state or "epoch" not in state:
        say(f"resume: {source} holds parameters only; optimizer and epoch start afresh")
        return start, {}
    load_optimizer_state(updater.optimizer, state["optimizer"], source)
    if state.get("scaler") and updater.scaler.is_enabled():
        # A run in bf16 or fp32 has no use for the scale, and hands it on to the next checkpoint as a fresh one.
        updater.scaler.load_state_dict(state["scaler"])
    own = state.get("mimir_fast")
    try:
        if own is None:
            epoch = int(state["epoch"]) + 1
            return Position(epoch=epoch, update=epoch * updates_per_epoch), {}
        # The third, the longest series of skipped updates, ends a run that reaches a limit: a new run begins its own.
        total, in_a_row, _ = own["counters"]
        updater.counters.copy_(torch.tensor([total, in_a_row, in_a_row]))
        return _position(own, geometry, images, say), own
    # Entries of those names that another program wrote.
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(
            f"resume: {source} does not say where its run stands ({type(error).__name__}: {error}); to begin from its "
            "parameters, take a file that holds those alone"
        ) from error


def _position(own: dict, geometry: list[int], images: str, say: Callable[[str], None]) -> Position:
    """Where our own entry says that a run stands."""
    changed = []
    if own["step"] and own["geometry"] != geometry:
        changed.append("batch size, processes or seed changed")
    # Not in older checkpoints.
    if own.get("images", images) != images:
        before, now = (str(fingerprint).partition("-")[0] for fingerprint in (own["images"], images))
        numbers = f"{before} then, {now} now" if before != now else f"{now} as before, but of other names or labels"
        changed.append(f"the training images changed ({numbers})")
    if not changed or not own["step"]:
        for what in changed:
            say(f"resume: {what}")
        return Position(epoch=own["epoch"], step=own["step"], update=own["update"], sums=dict(own["sums"]))
    say(f"resume: {' and '.join(changed)}; the interrupted epoch starts again from its beginning")
    return Position(epoch=own["epoch"], update=own["update"])


def resume(
    found: tuple[str, dict] | None,
    world: World,
    model: nn.Module,
    updater: Updater,
    start: Position,
    geometry: list[int],
    updates_per_epoch: int,
    say: Callable[[str], None],
    images: str = "",
) -> tuple[Position, dict]:
    """Resume from what `find_state` found; returns the position and the checkpoint's entry of our own, empty without one.

    Raises ValueError if the processes found different checkpoints, and what restore raises.
    """
    position = start
    own: dict = {}
    if found is not None:
        name, state = found
        position, own = restore(state, name, model, updater, start, geometry, updates_per_epoch, say, images)
    p = position
    # Each process has read the folder by itself: on local disks they may hold different files.
    if not world.same([p.epoch, p.step, p.update]):
        raise ValueError("resume: the processes found different checkpoints; output_dir must be a folder they share")
    if found is not None:
        say(f"resumed {name}: epoch {p.epoch}, micro-step {p.step}, {p.update} updates done")
    return p, own


def open_folder(folder: Path, flat: dict, position: Position) -> bool:
    """Prepare a run's folder and write config.yaml; returns whether it holds checkpoints past the run's starting position."""
    folder.mkdir(parents=True, exist_ok=True)
    remove_temporaries(folder)
    # YAML's safe dumper knows no tuples.
    plain = {name: list(value) if isinstance(value, tuple) else value for name, value in flat.items()}
    path, text = folder / "config.yaml", yaml.safe_dump(plain, sort_keys=False)
    # Another run's, which has its flags nowhere else but in its checkpoints.
    if not position.update and path.exists() and path.read_bytes() != text.encode(errors="surrogateescape"):
        before = path.read_bytes()
        write_atomically(free_name(path.with_name("config.yaml.old")), lambda file: file.write(before))
    write_text_atomically(path, text)
    return bool(ckpt.beyond(folder, position.epoch, position.step))


class Due(NamedTuple):
    """What follows an update: logging, a resume point, and the reason to end the run there, or None."""

    log: bool
    resume_point: bool
    reason: str | None


def due(run: RunConfig, position: Position, steps: int, first_update: int, ends: bool) -> Due:
    """What is due after an update in an epoch of `steps` micro-steps; ends: whether a signal asked the run to end."""
    p, last = position, position.step == steps
    enough = bool(run.max_steps) and p.update >= run.max_steps
    point = bool(run.checkpoint_steps) and p.update % run.checkpoint_steps == 0
    # What a resume point counts as done is logged before it: a run that resumes there does not do it again.
    log = p.update % run.log_every == 0 or p.update == first_update or point or ends or enough or last
    # The end of the epoch saves, and ends the run, itself.
    if last:
        return Due(log, False, None)
    return Due(log, point or ends or enough, "signal" if ends else "max_steps" if enough else None)


def end_status(reason: str | None, received: int | None, position: Position, folder: Path | None, say) -> int:
    """Print how the run ended; returns the exit status: 0, 1 diverged, 130 Ctrl-C."""
    if reason == "diverged":
        return 1
    if reason == "signal":
        name = signal.Signals(received or signal.SIGTERM).name
        say(f"stopped by {name}; " + ("go on with --resume auto" if folder else "nothing saved: no output_dir"))
        # SIGTERM is how schedulers take a machine back: saved and to be resumed, that is no failure.
        return 130 if received == signal.SIGINT else 0
    say(f"done: epoch {position.epoch}, {position.update} updates")
    return 0
