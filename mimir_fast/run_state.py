"""A run's state: where it stands, what goes into a checkpoint, and how it is taken up again.

Every random draw of the loader and of the step is a function of (seed, rank, epoch, step), so the position is the state
of every random generator.
"""

import argparse
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import nn

from mimir_fast import checkpoint as ckpt
from mimir_fast.config import PretrainConfig
from mimir_fast.optim import Updater

# the original resumes with an enabled GradScaler, which refuses an empty state
FRESH_SCALER = {
    "scale": 65536.0,
    "growth_factor": 2.0,
    "backoff_factor": 0.5,
    "growth_interval": 2000,
    "_growth_tracker": 0,
}
EPOCH_SUMS = ("loss", "finite", "mi", "mi_used", "grad_norm", "updates", "micro_steps", "lr")


@dataclass
class Position:
    """Where a run stands: the next micro-step `step` of `epoch`, `update` optimizer updates done, this epoch's sums."""

    epoch: int = 0
    step: int = 0
    update: int = 0
    sums: dict[str, float] = field(default_factory=lambda: dict.fromkeys(EPOCH_SUMS, 0.0))


def checkpoint_state(
    weights: dict,
    moments: dict,
    updater: Updater,
    position: Position,
    config: PretrainConfig,
    lr: float,
    dataset: str,
    skipped_penalties: int,
    geometry: list[int],
) -> dict:
    """The original's five entries, and ours under `mimir_fast`; only tensors, plain values and the args Namespace.

    As in the original, args holds eps and alpha divided by 255, the learning rate used and the data set's full name.
    weights, moments: state dicts of the whole model and its optimizer
    geometry: what a position inside an epoch depends on.
    """
    flat = config.flat()
    flat |= {"eps": flat["eps"] / 255, "alpha": flat["alpha"] / 255, "lr": lr, "dataset": dataset}
    return {
        "model": weights,
        "optimizer": moments,
        "epoch": position.epoch - 1,  # the original goes on at epoch + 1
        "scaler": updater.scaler.state_dict() or FRESH_SCALER,
        "args": argparse.Namespace(**flat),
        "mimir_fast": asdict(position)
        | {"counters": updater.counters.tolist(), "skipped_penalties": skipped_penalties, "geometry": geometry},
    }


def find_state(resume: str, folder: Path | None, say: Callable[[str], None]) -> tuple[str, dict] | None:
    """The checkpoint --resume means, with its name; None to start from the beginning.

    Raises ValueError if 'auto' has no output_dir to look into, CheckpointError if the file cannot be used.
    """
    if not resume:
        return None
    if resume != "auto":
        return resume, ckpt.load_checkpoint(resume)
    if folder is None:
        raise ValueError("resume: 'auto' looks into output_dir, which is empty")
    found = ckpt.load_newest(folder, say)
    if found is None:
        say(f"resume: no checkpoint in {folder}, starting from the beginning")
        return None
    return str(found[0]), found[1]


def restore(
    state: dict,
    source: str,
    model: nn.Module,
    updater: Updater,
    start: Position,
    geometry: list[int],
    updates_per_epoch: int,
    say: Callable[[str], None],
) -> tuple[Position, int]:
    """Load a checkpoint of ours or of the original; returns the position and the penalties skipped so far.

    start: the position to keep if the checkpoint holds parameters only.
    """
    ckpt.load_model_state(model, state, source)
    if "optimizer" not in state or "epoch" not in state:
        say(f"resume: {source} holds parameters only; optimizer and epoch start afresh")
        return start, 0
    ckpt.load_optimizer_state(updater.optimizer, state["optimizer"], source)
    if state.get("scaler") and updater.scaler.is_enabled():
        updater.scaler.load_state_dict(state["scaler"])
    own = state.get("mimir_fast")
    if own is None:
        epoch = int(state["epoch"]) + 1
        return Position(epoch=epoch, update=epoch * updates_per_epoch), 0
    total, in_a_row, _ = own["counters"]
    updater.counters = torch.tensor([total, in_a_row, in_a_row], device=updater.counters.device)
    position = Position(epoch=own["epoch"], step=own["step"], update=own["update"], sums=dict(own["sums"]))
    if position.step and own["geometry"] != geometry:
        say("resume: batch size, processes or seed changed; the interrupted epoch starts again from its beginning")
        position = Position(epoch=own["epoch"], update=own["update"])
    return position, own["skipped_penalties"]
