"""python -m bench train: images per second of the real training loop, and where the time goes."""

import argparse
import statistics
import sys
from pathlib import Path

import torch

from bench.model_flops import model_flops
from bench.peaks import PEAKS
from bench.records import RESULTS, append, heading, partition
from bench.stage_times import BESIDE, StageTimes, percentiles
from bench.step.counts import pretend_gpu
from bench.training import EndedEarlyError, add_arguments, check, device_name, open_trainer, peaks_name, run
from mimir_fast.training import stages
from mimir_fast.training.logs import peak_memory_gib
from mimir_fast.training.loop import Loop

EPILOG = f"""Trainer flags may follow --, for instance: python -m bench train --data_root FOLDER -- --num_workers 8
Nothing is saved unless --output_dir is among them.  Stages (mimir_fast/training/stages.py):
{stages.__doc__.split(chr(10), 2)[2].strip()}
rest: logs, sums, and on CUDA the wait for the penalty.  A share is the time between a stage's ends on its stream, where the
device had nothing to do included.  Shares add up to 1; on CUDA the penalty runs beside the decoder and comes on top.
data wait is the host's: the device may have had work meanwhile.  MFU: products and attention of attack, forward and backward
pass, without the penalty, against the dense peak of the arithmetic used."""


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench train",
        description=__doc__.split(": ", 1)[1],
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_arguments(parser, updates=50, warmup=10)
    default = str(RESULTS / "train.jsonl")
    parser.add_argument(
        "--results", default=default, metavar="FILE", help="JSON lines to append to (default: %(default)s)"
    )
    return parser


def main(arguments: list[str]) -> int:
    """Train, print, append the record; returns the exit status: 0, 1 if the training failed, 2 with one line on wrong input."""
    own, flags = partition(arguments)
    args = build_parser().parse_args(own)
    try:
        check(args)
        with open_trainer(args, flags) as trainer:
            times = StageTimes(trainer.world.device, args.warmup)
            run(trainer, times.open, times.updated)
            record = measured(args, trainer, times)
    except ValueError as error:
        print(f"python -m bench train: error: {error}", file=sys.stderr)
        return 2
    except EndedEarlyError as error:
        print(f"python -m bench train: error: {error}", file=sys.stderr)
        return 1
    print(*lines(record), sep="\n")
    append(record, Path(args.results))
    return 0


def measured(args: argparse.Namespace, trainer: Loop, times: StageTimes) -> dict:
    """The record.  On a pretend GPU every time is None: there is none."""
    run = trainer.task.run
    config, device = run.config.updated(run.flat()), device_name(trainer.world, args.gpu)
    images = config.optim.batch_size * config.optim.accum_iter
    record = {
        **heading(device),
        "task": args.task,
        "threads": torch.get_num_threads(),
        "peaks": peaks_name(device, args.gpu),
        "config": config.flat() | {"data_root": Path(config.data.data_root).name},
        "updates": args.updates,
        "warmup": args.warmup,
        "images": trainer.stream.num_images,
        "peak GiB": peak_memory_gib(trainer.world.device),
        "model GFLOP per image": model_flops(config) / 1e9,
    }
    if pretend_gpu():
        nothing = dict.fromkeys(("images/s", "percentiles", "mfu", "data wait"))
        return record | nothing | {"stages": dict.fromkeys(times.shares())}
    seconds = times.updates()
    rate = images / statistics.mean(seconds)
    return record | {
        "images/s": rate,
        "percentiles": percentiles(seconds),
        "mfu": mfu(record, rate, config.compute.precision),
        "data wait": times.data_wait(),
        "stages": times.shares(),
    }


def mfu(record: dict, rate: float, precision: str) -> float | None:
    """Model FLOP/s over the peak of the arithmetic used; None where the peak is not known."""
    if record["peaks"] is None:
        return None
    tf32 = precision == "fp32" and torch.get_float32_matmul_precision() != "highest"
    peak = PEAKS[record["peaks"]].flops["tf32" if tf32 else precision]
    return record["model GFLOP per image"] * 1e9 * rate / peak


def lines(record: dict) -> list[str]:
    """The record for people."""
    config, device = record["config"], record["device"]
    size = f"{config['model']} {config['input_size']}/{config['patch_size']}, batch {config['batch_size']}"
    times_what = f" x {config['accum_iter']}" if config["accum_iter"] > 1 else ""
    found = [
        f"{size}{times_what}, {config['precision']}, compile {'on' if config['compile'] else 'off'}; {device}; "
        f"{record['images']} images ({config['data_root']}); {record['updates']} updates after {record['warmup']}",
        f"model {record['model GFLOP per image']:.2f} GFLOP per image; peak {record['peak GiB']:.2f} GiB"
        + (" (resident memory of the process)" if device == "cpu" else ""),
    ]
    if record["images/s"] is None:
        return [*found, f"a pretend GPU: no times; the run went through, stages {', '.join(record['stages'])}"]
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
