"""Logs of a run: metrics.jsonl and TensorBoard per update, log.txt per epoch, a progress bar, Weights & Biases.

Device scalars are queued and read together every `log_every` updates, so that logging never makes the device wait.
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
from torch import Tensor
from tqdm import tqdm

from mimir_fast.checkpoints.atomic import append_text, move, write_text_atomically
from mimir_fast.config.sections import RunConfig
from mimir_fast.training.distributed import World

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


def drop_lines(path: Path, key: str, last: float) -> None:
    """Keep the lines of a JSON-lines file whose `key` is at most `last`; what a killed run wrote after its checkpoint is
    removed."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines():
        try:
            if json.loads(line)[key] <= last:
                kept.append(line + "\n")
        # A line cut by the kill.
        except (json.JSONDecodeError, KeyError, TypeError):
            continue
    write_text_atomically(path, "".join(kept))


def set_aside(path: Path) -> None:
    """Rename the file of an earlier run to NAME.old."""
    if path.exists():
        move(path, path.with_name(path.name + ".old"))


class RunLog:
    """All outputs of a run but its checkpoints; only rank 0 writes, every rank calls.

    tags   the original's TensorBoard tags, in its order -> the keys they show; a key without a value is not written
    """

    def __init__(
        self, config: RunConfig, flat: dict, world: World, tags: dict[str, str], total_updates: int, position: tuple
    ):
        self.world, self.tags, self.total = world, tags, total_updates
        epoch, update, x = position
        self.folder = Path(config.output_dir) if config.output_dir and world.is_main else None
        self.writer = self.wandb = self.bar = None
        self.pending: list[tuple[dict, Tensor]] = []
        self.first_update, self.last_update, self.started = update, update, time.perf_counter()
        self.last_flush, self.data_seconds, self.images = self.started, 0.0, 0
        self.epoch_started, self.epoch_images = self.started, 0
        if not world.is_main:
            return
        if self.folder and update:
            drop_lines(self.folder / "metrics.jsonl", "update", update)
            drop_lines(self.folder / "log.txt", "epoch", epoch - 1)
        elif self.folder:
            set_aside(self.folder / "metrics.jsonl")
            set_aside(self.folder / "log.txt")
        if config.log_dir:
            # Slow to import: only where it writes.
            from torch.utils.tensorboard import SummaryWriter

            self.writer = SummaryWriter(log_dir=config.log_dir, purge_step=x if update else None)
        self.wandb = _start_wandb(config, flat) if config.wandb else None
        if sys.stderr.isatty():
            self.bar = tqdm(total=total_updates, initial=update, unit="step", dynamic_ncols=True)

    def say(self, text: str) -> None:
        """Print one line on rank 0 without breaking the bar."""
        if self.world.is_main:
            tqdm.write(text, file=sys.stdout)
            sys.stdout.flush()

    def add_update(self, update: int, epoch: float, lr: float, scalars: dict[str, Tensor], images: int, data_s: float):
        """Queue one update: scalars on the device; images, and seconds waited for data (data_s), since the last update."""
        host = {"update": update, "epoch": epoch, "x": int(1000 * epoch), "lr": lr}
        names, values = zip(*scalars.items())
        self.pending.append((host | {"names": names}, torch.stack([value.detach().float() for value in values])))
        self.images += images
        self.epoch_images += images
        self.data_seconds += data_s
        if self.bar is not None:
            self.bar.update(1)

    def flush(self) -> dict:
        """Read the queue back, averaged over all ranks, and write it everywhere; returns the newest row."""
        if not self.pending:
            return {}
        hosts, values = zip(*self.pending)
        self.pending = []
        table = self.world.mean(torch.stack(values)).tolist()
        now = time.perf_counter()
        elapsed = max(now - self.last_flush, 1e-9)
        shared = {
            "images_per_s": self.images * self.world.size / elapsed,
            "data_wait": min(self.data_seconds / elapsed, 1.0),
            "peak_memory_gib": peak_memory_gib(self.world.device),
        }
        self.last_flush, self.data_seconds, self.images = now, 0.0, 0
        rows = [_row(host, line, shared) for host, line in zip(hosts, table)]
        if self.world.is_main:
            self._write(rows)
        return rows[-1]

    def _write(self, rows: list[dict]) -> None:
        if self.folder:
            append_text(self.folder / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
        for row in rows:
            if self.writer:
                for tag, key in {**self.tags, **{tag: tag for tag in OWN_TAGS}}.items():
                    if row.get(key) is not None:
                        self.writer.add_scalar(tag, row[key], row["x"])
            if self.wandb:
                self.wandb.log({key: value for key, value in row.items() if value is not None}, step=row["update"])
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
        if self.bar is not None:
            self.bar.set_postfix_str(postfix)
            return
        done, seconds = row["update"] - self.first_update, time.perf_counter() - self.started
        self.say(
            tqdm.format_meter(
                row["update"], self.total, seconds, ncols=140, unit="step", postfix=postfix, initial=self.first_update
            )
            if done
            else postfix
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
        """Append one epoch's means to log.txt, the original's keys first, and flush TensorBoard's file."""
        if not self.world.is_main:
            return
        if self.folder:
            line = json.dumps({key: _finite(value) for key, value in row.items()})
            append_text(self.folder / "log.txt", line + "\n")
        if self.writer:
            for tag, key in EPOCH_TAGS.items():
                if row.get(key) is not None:
                    self.writer.add_scalar(tag, row[key], row["epoch"])
            self.writer.flush()
        if self.wandb:
            known = {f"epoch/{key}": value for key, value in row.items() if value is not None}
            self.wandb.log(known, step=self.last_update)
        self.say("epoch " + ", ".join(f"{key} {_short(value)}" for key, value in row.items() if value is not None))

    def close(self) -> None:
        for sink in (self.bar, self.writer):
            if sink is not None:
                sink.close()
        if self.wandb is not None:
            self.wandb.finish()


def _row(host: dict, line: list[float], shared: dict) -> dict:
    row = {key: host[key] for key in ("update", "epoch", "x", "lr")} | dict(zip(host["names"], line)) | shared
    row |= {key: round(row[key]) for key in COUNTS if key in row}
    return {key: _finite(value) for key, value in row.items()}


def _finite(value):
    # JSON has no NaN and no infinity.
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _short(value) -> str:
    if value is None:
        return "nan"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _start_wandb(config: RunConfig, flat: dict):
    try:
        import wandb
    except ImportError as error:
        raise ValueError(
            "wandb: the package is not installed; pip install 'mimir-fast[wandb]' or leave the flag out"
        ) from error
    return wandb.init(project="mimir_fast", dir=config.output_dir or None, config=flat)
