"""What the report reads from a run's folder, every file checked: metrics.jsonl, log.txt, config.yaml, samples.npz."""

import json
import math
import zipfile
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import yaml

COLUMNS = (
    "epoch",
    "loss",
    "recon",
    "mi",
    "lr",
    "images_per_s",
    "data_wait",
    "peak_memory_gib",
    "skipped_penalties",
    "skipped_steps",
)


@dataclass(frozen=True)
class Metrics:
    """metrics.jsonl, one entry per update, sorted by update.

    update    [n] int64
    columns   {name of COLUMNS: [n] float64}, NaN where the value was null, missing or not finite
    repeated  lines replaced by a later line of the same update (a resumed run)
    unreadable, cut   lines left out because they are no JSON of an update; whether the last line is one of them
    """

    update: np.ndarray
    columns: dict[str, np.ndarray]
    repeated: int
    unreadable: int
    cut: bool

    def __getitem__(self, name: str) -> np.ndarray:
        return self.columns[name]

    @property
    def x(self) -> np.ndarray:
        """[n] what figures are drawn against: epochs, or updates where an epoch is not known."""
        return self["epoch"] if np.isfinite(self["epoch"]).all() else self.update.astype(np.float64)

    @property
    def x_label(self) -> str:
        return "epoch" if np.isfinite(self["epoch"]).all() else "update"

    def increases(self, name: str) -> np.ndarray:
        """[n] bool, the updates at which a counter of the whole run went up."""
        counts = np.nan_to_num(self[name])
        before = 0.0 if self.update[0] <= 1 else counts[0]
        return np.diff(counts, prepend=before) > 0


@dataclass(frozen=True)
class Samples:
    """samples.npz: clean, adv, recon [n,3,H,W] float32, removed [n,L] bool, the patch side, the attack radius in 1/255."""

    clean: np.ndarray
    adv: np.ndarray
    recon: np.ndarray
    removed: np.ndarray
    patch_size: int
    update: int
    eps_255: float

    @property
    def max_perturbation_255(self) -> float:
        """Largest |adv - clean| in 1/255; NaN if no pixel is finite."""
        size = np.abs(self.adv - self.clean)
        size = size[np.isfinite(size)]
        return float(size.max()) * 255 if size.size else math.nan


def json_lines(path: Path) -> Iterator[dict | None]:
    """The objects of a JSON-lines file, one line in memory at a time; None for a line that is no JSON object."""
    with open(path, encoding="utf-8", errors="replace") as file:
        for line in file:
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError:
                row = None
            yield row if isinstance(row, dict) else None


def number(value) -> float:
    """A JSON value as a finite float, NaN for everything else."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return math.nan
    try:
        return float(value) if math.isfinite(value) else math.nan
    except OverflowError:  # an integer beyond float's range
        return math.nan


def read_metrics(path: Path) -> Metrics:
    """Read metrics.jsonl; of several lines for one update the last counts.

    Raises ValueError if no line can be used, OSError if the file cannot be read.
    """
    updates, columns = array("q"), {name: array("d") for name in COLUMNS}
    unreadable, cut = 0, False
    for row in json_lines(path):
        update = row.get("update") if row else None
        cut = isinstance(update, bool) or not isinstance(update, int) or not 0 <= update < 2**63
        unreadable += cut
        if not cut:
            updates.append(update)
            for name, column in columns.items():
                column.append(number(row.get(name)))
    if not updates:
        raise ValueError(
            f"run_dir: {path} holds no metrics ({unreadable} unreadable lines); "
            "wait for the run's first --log_every updates, or pass another run's --output_dir"
        )
    update = np.array(updates)
    unique, newest = np.unique(update[::-1], return_index=True)
    order = len(update) - 1 - newest
    kept = {name: np.array(column)[order] for name, column in columns.items()}
    return Metrics(unique, kept, len(update) - len(unique), unreadable, cut)


def read_epochs(path: Path) -> list[dict]:
    """The epochs of log.txt in order, [] if there are none; of several lines for one epoch the last counts."""
    if not path.exists():
        return []
    rows = [row for row in json_lines(path) if row and math.isfinite(number(row.get("epoch")))]
    newest = {row["epoch"]: row for row in rows}
    return [newest[epoch] for epoch in sorted(newest)]


def read_config(path: Path) -> dict:
    """{flag: value} of config.yaml.  Raises ValueError saying why there is none."""
    if not path.exists():
        raise ValueError("config.yaml is not in this folder")
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"config.yaml cannot be read: {error}") from error
    if not isinstance(config, dict):
        raise ValueError("config.yaml holds no `flag: value` lines")
    return {str(name): value for name, value in config.items()}


def read_samples(path: Path) -> Samples:
    """Read samples.npz.  Raises ValueError saying why it cannot be shown."""
    if not path.exists():
        raise ValueError("samples.npz is not in this folder; a run writes it beside every checkpoint")
    try:
        with np.load(path) as file:
            images = {name: np.asarray(file[name], dtype=np.float32) for name in ("clean", "adv", "recon")}
            removed = np.asarray(file["mask"]) > 0.5
            scalars = (int(file["patch_size"]), int(file["update"]), float(file["eps_255"]))
    except KeyError as error:
        raise ValueError(f"samples.npz lacks an array: {error.args[0]}") from error
    except (OSError, EOFError, ValueError, TypeError, AttributeError, zipfile.BadZipFile) as error:
        raise ValueError(f"samples.npz cannot be read: {error}") from error
    samples = Samples(**images, removed=removed, patch_size=scalars[0], update=scalars[1], eps_255=scalars[2])
    _check_shapes(samples)
    return samples


def _check_shapes(samples: Samples) -> None:
    shape, patch = samples.clean.shape, samples.patch_size
    if len(shape) != 4 or shape[1] != 3 or 0 in shape:
        raise ValueError(f"samples.npz: clean has shape {shape}, expected [n,3,H,W] with n of 1 or more")
    for name in ("adv", "recon"):
        if getattr(samples, name).shape != shape:
            raise ValueError(f"samples.npz: {name} has shape {getattr(samples, name).shape}, clean has {shape}")
    if patch < 1 or shape[2] % patch or shape[3] % patch:
        raise ValueError(f"samples.npz: patch_size {patch} does not divide {shape[2]} x {shape[3]} pixels")
    patches = (shape[2] // patch) * (shape[3] // patch)
    if samples.removed.shape != (shape[0], patches):
        raise ValueError(f"samples.npz: mask has shape {samples.removed.shape}, expected {(shape[0], patches)}")
