"""python -m bench train: images per second of the real training loop, model FLOPs utilisation, memory, the wait for data."""

import argparse
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

import torch

from bench import loop, records
from bench.peaks import PEAKS, peak_of
from bench.simulated_gpu import marker
from bench.steps import model_flops
from mimir_fast.training.logs import peak_memory_gib

EPILOG = """Trainer flags may follow --, for instance: python -m bench train --data_root FOLDER -- --num_workers 8
Nothing is saved unless --output_dir is among them.  data wait is the host's: the device may have had work meanwhile.
MFU: products and attention of attack, forward and backward pass, without the penalty, against the dense peak of the arithmetic
used.  python -m bench profile tells where the time goes."""


class Updates:
    """When the observed updates ended, on the device where there is one, and how long the host waited for images meanwhile."""

    def __init__(self, device: torch.device, warmup: int):
        self.device, self.warmup = device, warmup
        self.ends: list = []  # from the update number `warmup` on: CUDA events, on CPUs the host's seconds
        self.waited = self.began = self.ended = 0.0  # host seconds

    @contextmanager
    def opened(self, name: str) -> Iterator[None]:
        asked = time.perf_counter()
        yield
        if self.ends and name == "data":
            self.waited += time.perf_counter() - asked

    def updated(self, count: int) -> None:
        if count < self.warmup:
            return
        self.ended = time.perf_counter()
        if count == self.warmup:
            self.began = self.ended
            if self.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(self.device)
        if self.device.type == "cuda":  # read after the last update, so that the step never waits
            self.ends.append(torch.cuda.Event(enable_timing=True))
            self.ends[-1].record()
        else:
            self.ends.append(self.ended)

    def seconds(self) -> list[float]:
        """Of every observed update; waits for the device."""
        if self.device.type != "cuda":
            return [end - start for start, end in pairwise(self.ends)]
        torch.cuda.synchronize(self.device)
        return [start.elapsed_time(end) / 1e3 for start, end in pairwise(self.ends)]


def build_parser() -> argparse.ArgumentParser:
    parser = records.parser("train", __doc__, EPILOG, "train.jsonl")
    loop.add_arguments(parser, updates=50, warmup=10)
    return parser


def run(args: argparse.Namespace, flags: list[str]) -> int:
    """Train, print, append the record; returns the exit status: 0, or 1 if the training ended early."""
    with loop.open_trainer(args, flags) as trainer:
        updates = Updates(trainer.world.device, args.warmup)
        if why := loop.run(trainer, updates.opened, updates.updated):
            print(f"python -m bench train: error: {why}", file=sys.stderr)
            return 1
        record = measured(args, trainer, updates)
    print(*lines(record), sep="\n")
    records.append(record, args.results)
    return 0


def measured(args: argparse.Namespace, trainer: loop.Loop, updates: Updates) -> dict:
    """The record.  On a simulated GPU every time is None: there is none."""
    device, run = records.device_name(trainer.world.device), trainer.task.run
    config = run.config.flat() | run.flat()
    record = {
        **records.heading(device),
        "task": args.task,
        "threads": torch.get_num_threads(),
        "peaks": peaks_of(device, args.gpu),
        "config": config | {"data_root": Path(config["data_root"]).name},
        "updates": args.updates,
        "warmup": args.warmup,
        "images": trainer.stream.num_images,
        "peak GiB": peak_memory_gib(trainer.world.device),
        "model GFLOP per image": model_flops(run.config.updated(run.flat())) / 1e9,
    }
    if marker():
        return record | dict.fromkeys(("images/s", "percentiles", "mfu", "data wait"))
    seconds = updates.seconds()
    rate = config["batch_size"] * config["accum_iter"] / statistics.mean(seconds)
    wait = updates.waited / (updates.ended - updates.began)
    return record | {
        "images/s": rate, "percentiles": records.percentiles(seconds), "mfu": mfu(record, rate), "data wait": wait
    }  # fmt: skip


def peaks_of(device: str, gpu: str | None) -> str | None:
    """Key of PEAKS for the record's device, None where they are not known: on any CPU."""
    try:
        return None if device == "cpu" else gpu or peak_of(device)
    except ValueError:
        return None


def mfu(record: dict, rate: float) -> float | None:
    """Model FLOP/s over the peak of the arithmetic used; None where the peak is not known."""
    if record["peaks"] is None:
        return None
    precision = record["config"]["precision"]
    tf32 = precision == "fp32" and torch.get_float32_matmul_precision() != "highest"
    peak = PEAKS[record["peaks"]].flops["tf32" if tf32 else precision]
    return record["model GFLOP per image"] * 1e9 * rate / peak


def lines(record: dict) -> Iterator[str]:
    """The record for people."""
    config, device = record["config"], record["device"]
    yield (
        "{model} {input_size}/{patch_size}, batch {batch_size} x {accum_iter}, {precision}".format(**config)
        + f", compile {'on' if config['compile'] else 'off'}; {device}; {record['images']} images "
        f"({config['data_root']}); {record['updates']} updates after {record['warmup']}"
    )
    resident = " (resident memory of the process)" if device == "cpu" else ""
    yield f"model {record['model GFLOP per image']:.2f} GFLOP per image; peak {record['peak GiB']:.2f} GiB{resident}"
    if record["images/s"] is None:
        yield "a simulated GPU: no times; the run went through"
        return
    fast, slow = (record["percentiles"][key] * 1e3 for key in ("20", "80"))
    ratio = "unknown" if record["mfu"] is None else f"{record['mfu']:.1%}"
    yield (
        f"{record['images/s']:.1f} images/s; update {fast:.1f} to {slow:.1f} ms (20th to 80th percentile); "
        f"MFU {ratio}; data wait {record['data wait']:.1%}"
    )
