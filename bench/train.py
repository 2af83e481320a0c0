"""python -m bench train: images per second of the real training loop, and where the time goes."""

import argparse
import statistics
import sys
from pathlib import Path

import torch

from bench import loop, records
from bench.peaks import PEAKS, peak_of
from bench.simulated_gpu import marker
from bench.stage_times import BESIDE, StageTimes, percentiles
from bench.steps import model_flops
from mimir_fast.training import stages
from mimir_fast.training.logs import peak_memory_gib

EPILOG = f"""Trainer flags may follow --, for instance: python -m bench train --data_root FOLDER -- --num_workers 8
Nothing is saved unless --output_dir is among them.  Stages (mimir_fast/training/stages.py):
{stages.__doc__.split(chr(10), 2)[2].strip()}
rest: logs, sums, and on CUDA the wait for the penalty.  A share is the time between a stage's ends on its stream, where the
device had nothing to do included.  Shares add up to 1; on CUDA the penalty runs beside the decoder and comes on top.
data wait is the host's: the device may have had work meanwhile.  MFU: products and attention of attack, forward and backward
pass, without the penalty, against the dense peak of the arithmetic used."""


def build_parser() -> argparse.ArgumentParser:
    parser = records.parser("train", __doc__, EPILOG, "train.jsonl")
    loop.add_arguments(parser, updates=50, warmup=10)
    return parser


def run(args: argparse.Namespace, flags: list[str]) -> int:
    """Train, print, append the record; returns the exit status: 0, or 1 if the training ended early."""
    with loop.open_trainer(args, flags) as trainer:
        times = StageTimes(trainer.world.device, args.warmup)
        if why := loop.run(trainer, times.open, times.updated):
            print(f"python -m bench train: error: {why}", file=sys.stderr)
            return 1
        record = measured(args, trainer, times)
    print(*lines(record), sep="\n")
    records.append(record, args.results)
    return 0


def measured(args: argparse.Namespace, trainer: loop.Loop, times: StageTimes) -> dict:
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
        nothing = dict.fromkeys(("images/s", "percentiles", "mfu", "data wait"))
        return record | nothing | {"stages": dict.fromkeys(times.shares())}
    seconds = times.updates()
    rate = config["batch_size"] * config["accum_iter"] / statistics.mean(seconds)
    return record | {
        "images/s": rate,
        "percentiles": percentiles(seconds),
        "mfu": mfu(record, rate),
        "data wait": times.data_wait(),
        "stages": times.shares(),
    }


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


def lines(record: dict) -> list[str]:
    """The record for people."""
    config, device = record["config"], record["device"]
    times_what = f" x {config['accum_iter']}" if config["accum_iter"] > 1 else ""
    found = [
        "{model} {input_size}/{patch_size}, batch {batch_size}".format(**config) + times_what
        + f", {config['precision']}, compile {'on' if config['compile'] else 'off'}; {device}; "
        f"{record['images']} images ({config['data_root']}); {record['updates']} updates after {record['warmup']}",
        f"model {record['model GFLOP per image']:.2f} GFLOP per image; peak {record['peak GiB']:.2f} GiB"
        + (" (resident memory of the process)" if device == "cpu" else ""),
    ]  # fmt: skip
    if record["images/s"] is None:
        return [*found, f"a simulated GPU: no times; the run went through, stages {', '.join(record['stages'])}"]
    fast, slow = (record["percentiles"][key] * 1e3 for key in ("20", "80"))
    ratio = "unknown" if record["mfu"] is None else f"{record['mfu']:.1%}"
    found.append(
        f"{record['images/s']:.1f} images/s; update {fast:.1f} to {slow:.1f} ms (20th to 80th percentile); "
        f"MFU {ratio}; data wait {record['data wait']:.1%}"
    )
    for name, share in sorted(record["stages"].items(), key=lambda item: -item[1]):
        beside = "  (beside the decoder)" if name == BESIDE and device != "cpu" else ""
        found.append(f"{share:7.1%}  {name}{beside}")
    return found
