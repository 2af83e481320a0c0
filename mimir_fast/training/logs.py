"""Logs of a run: metrics.jsonl and TensorBoard per update, log.txt per epoch, a progress bar, Weights & Biases (see sinks.py).

The device's numbers are read together every `log_every` updates, and written when they have arrived: logging never makes the
device wait.
"""

import json
import math
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from tqdm import tqdm

from mimir_fast.checkpoints.atomic import free_name, move, write_atomically
from mimir_fast.checkpoints.folder import LOGS
from mimir_fast.config.sections import RunConfig
from mimir_fast.training.distributed import World
from mimir_fast.training.events import Events, drop_points, is_url
from mimir_fast.training.metrics_table import MetricsTable, RowQueue
from mimir_fast.training.sinks import Console, Lines, WandbRun, can_show

GIB = 2**30
COUNTS = ("skipped_penalties", "skipped_steps")
RATED = ("test_acc1", "test_acc5", "test_loss", "robust_acc1", "val_acc1", "val_robust_acc1", "val_loss")
# The original's three tags, and ours, over the epoch.
EPOCH_TAGS = {f"perf/{name}": name for name in RATED}
OWN_TAGS = ("recon", "grad_norm", "images_per_s", "peak_memory_gib", "skipped_penalties", "skipped_steps")


def peak_memory_gib(device: torch.device) -> float:
    """Peak of the CUDA allocator, or of the process's resident memory on the CPU, in GiB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / GIB
    # In bytes on macOS, in KiB on Linux.
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / GIB if sys.platform == "darwin" else peak * 1024 / GIB


def drop_lines(path: Path, key: str, last: float, below: float = math.inf) -> None:
    """Keep the lines of a JSON-lines file whose `key` is at most `last` and whose epoch is below `below`.

    What a killed run wrote after its checkpoint is removed, and so is what cannot be read, whatever bytes it holds.
    """
    if not path.exists():
        return
    kept = []
    for line in path.read_bytes().split(b"\n"):
        try:
            row = json.loads(line)
            if row[key] <= last and row.get("epoch", 0) < below:
                kept.append(line + b"\n")
        # A line cut by the kill, or damaged.
        except (ValueError, KeyError, TypeError, AttributeError):
            continue
    write_atomically(path, lambda file: file.writelines(kept))


def set_aside(path: Path) -> None:
    """Rename the file of an earlier run to NAME.old, NAME.old.2, ..."""
    if path.exists():
        move(path, free_name(path.with_name(path.name + ".old")))


class RunLog:
    """All outputs of a run but its checkpoints; only rank 0 writes, every rank calls.

    tags   the original's TensorBoard tags, in its order -> the keys they show; a key without a value is not written
    rows   what the device writes of every update
    skipped_in_a_row   updates skipped in a row, at worst, by the rows written so far
    """

    def __init__(
        self,
        config: RunConfig,
        flat: dict,
        world: World,
        tags: dict[str, str],
        total_updates: int,
        start: tuple[int, int, float],
        rows: MetricsTable,
        wandb_run: str | None = None,
    ):
        """start: epochs and updates done, and the position in epochs; wandb_run: the run to continue there."""
        self.world, self.tags, self.total = world, tags, total_updates
        epoch, update, position = start
        self.folder = Path(config.output_dir) if config.output_dir and world.is_main else None
        self.writer: Events | None = None
        self.wandb: WandbRun | None = None
        self.files: dict[str, Lines] = {}
        self.rows, self.skipped_in_a_row = RowQueue(rows, world), 0.0
        self.first_update, self.last_update, self.started = update, update, time.perf_counter()
        self.last_flush = self.started
        self.epoch_started, self.epoch_images = self.started, 0
        if not world.is_main:
            return
        self.console = Console(total_updates, update)
        if self.folder:
            self._open_files(self.folder, *start)
        if config.log_dir:
            if update and not is_url(config.log_dir):
                drop_points(Path(config.log_dir), tuple(EPOCH_TAGS), epoch, self.say)
            self.writer = Events(config.log_dir, self.say, int(1000 * position) if update else None)
        self.wandb = WandbRun(config.output_dir, flat, self.say, wandb_run) if config.wandb else None

    def _open_files(self, folder: Path, epoch: int, update: int, position: float) -> None:
        self.write_to(folder)
        if update:
            # An epoch that begins again has its rows again: by the number of updates alone the x-axis would go back.
            drop_lines(folder / "metrics.jsonl", "update", update, position)
            drop_lines(folder / "log.txt", "epoch", epoch - 1)
        else:
            for name in self.files:
                set_aside(folder / name)

    def write_to(self, folder: Path) -> None:
        """Append the lines that follow to the files of this folder."""
        self.folder, self.files = folder, {name: Lines(folder / name, self.say) for name in LOGS}

    def say(self, text: str) -> None:
        """Print one line on rank 0 without breaking the bar."""
        if self.world.is_main:
            self.console.say(text)

    def add_update(self, update: int, epoch: float, lr: float, images: int, data_s: float) -> None:
        """Count an update, whose row the device writes; images, and seconds waited for data (data_s), since the last update."""
        host = {"update": update, "epoch": epoch, "x": int(1000 * epoch), "lr": lr}
        self.rows.add(host, {"images": images, "data_seconds": data_s})
        self.epoch_images += images
        if self.rows.arrived():
            self._write_arrived()
        if self.world.is_main:
            self.console.advance()

    def flush(self, wait: bool = True) -> None:
        """Write the rows asked for by the last call, and ask for those since then, averaged over all ranks.

        wait   write these as well; without, the host does not wait for a GPU, and they are written when they have arrived
        """
        self._write_arrived()
        if self.rows.ask() or wait:
            self._write_arrived()

    def _write_arrived(self) -> None:
        """Write all rows that were asked for; waits for them."""
        rows, totals = self.rows.take()
        if not rows:
            return
        now = time.perf_counter()
        elapsed = max(now - self.last_flush, 1e-9)
        shared = {
            "images_per_s": totals["images"] * self.world.size / elapsed,
            "data_wait": min(totals["data_seconds"] / elapsed, 1.0),
            "peak_memory_gib": peak_memory_gib(self.world.device),
        }
        self.last_flush = now
        self.skipped_in_a_row = rows[-1]["skipped_in_a_row"]
        if self.world.is_main:
            self._write([_row(row | shared) for row in rows])

    def _write(self, rows: list[dict]) -> None:
        if self.files:
            self.files["metrics.jsonl"].add("".join(json.dumps(row) + "\n" for row in rows))
        if self.writer:
            tags = {**self.tags, **{tag: tag for tag in OWN_TAGS}}.items()
            shown = [(tag, row[key], row["x"]) for row in rows for tag, key in tags if row.get(key) is not None]
            self.writer.add(shown)
        if self.wandb:
            for row in rows:
                self.wandb.log(row, row["update"])
        self.last_update = rows[-1]["update"]
        self._show(rows[-1])

    def _show(self, row: dict) -> None:
        words = {"epoch": f"{row['epoch']:.2f}", "loss": _short(row["loss"]), "lr": _short(row["lr"])}
        if "mi" in self.tags:
            words["mi"] = _short(row["mi"])
        words["img/s"] = f"{row['images_per_s']:.0f}"
        words["wait"] = f"{row['data_wait']:.0%}"
        words["mem"] = f"{row['peak_memory_gib']:.1f}GiB"
        postfix = ", ".join(f"{key}={value}" for key, value in words.items())
        if self.console.bar is not None:
            self.console.note(postfix)
            return
        seconds, ascii_only = time.perf_counter() - self.started, not can_show("█")
        done = (row["update"], self.total, seconds)
        self.say(
            tqdm.format_meter(
                *done, ncols=140, ascii=ascii_only, unit="step", postfix=postfix, initial=self.first_update
            )
        )

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Context whose time, that of a validation, does not count in images per second."""
        began = time.perf_counter()
        yield
        spent = time.perf_counter() - began
        self.last_flush, self.epoch_started = self.last_flush + spent, self.epoch_started + spent

    def epoch_rate(self) -> float:
        """Images per second over all ranks since the last call."""
        now = time.perf_counter()
        rate = self.epoch_images * self.world.size / max(now - self.epoch_started, 1e-9)
        self.epoch_started, self.epoch_images = now, 0
        return rate

    def add_epoch(self, row: dict) -> None:
        """Append one epoch's means to log.txt, the original's keys first, and to TensorBoard's file."""
        if not self.world.is_main:
            return
        if self.files:
            self.files["log.txt"].add(json.dumps({key: _finite(value) for key, value in row.items()}) + "\n")
        if self.writer:
            points = [(tag, row[key], row["epoch"]) for tag, key in EPOCH_TAGS.items() if row.get(key) is not None]
            self.writer.add(points)
        if self.wandb:
            self.wandb.log({f"epoch/{key}": value for key, value in row.items()}, self.last_update)
        self.say("epoch " + ", ".join(f"{key} {_short(value)}" for key, value in row.items() if value is not None))

    def close(self) -> None:
        """Close everything, as far as that is possible."""
        if self.world.is_main:
            self.console.close()
        for sink in (*self.files.values(), self.writer, self.wandb):
            if sink is not None:
                sink.close()


def _row(row: dict) -> dict:
    row |= {key: round(row[key]) for key in COUNTS if key in row}
    return {key: _finite(value) for key, value in row.items() if key != "skipped_in_a_row"}


def _finite(value):
    # JSON has no NaN and no infinity.
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _short(value) -> str:
    if value is None:
        return "nan"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
