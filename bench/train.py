"""python -m bench train: images per second of the real training loop, model FLOPs utilisation, memory, the wait for data."""

import argparse
import json
import statistics
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch

from bench import loop, records
from bench.peaks import PEAKS
from bench.simulated_gpu import marker
from bench.steps import as_run, model_flops

EPILOG = """Other flags are the trainer's, for instance: python -m bench train --data_root FOLDER --num_workers 8
Nothing is saved unless --output_dir is among them.  Times, the wait for data and memory are those of the trainer's own
metrics.jsonl; they are means of as many updates as the warm-up has, between two of which the device is waited for.
MFU: products and attention of attack, forward and backward pass, without the penalty, against the dense peak of the arithmetic
used.  python -m bench profile tells where the time goes."""


def build_parser() -> argparse.ArgumentParser:
    parser = records.parser("train", __doc__, EPILOG, "train.jsonl")
    loop.add_arguments(parser, updates=50, warmup=10)
    return parser


def run(args: argparse.Namespace, flags: list[str]) -> int:
    """Train, print, append the record."""
    with loop.open_trainer(args, flags) as trainer, tempfile.TemporaryDirectory() as folder:
        # Metrics without checkpoints, if these are not asked for.
        metrics = trainer.folder or Path(folder)
        trainer.log.write_to(metrics)
        loop.run(trainer)
        rows = [json.loads(line) for line in (metrics / "metrics.jsonl").read_text().splitlines()]
        record = measured(args, trainer, rows[-args.updates :])
    print(*lines(record), sep="\n")
    records.append(record, args.results)
    return 0


def measured(args: argparse.Namespace, trainer: loop.Loop, rows: list[dict]) -> dict:
    """The record, from the trainer's rows of the observed updates.  On a simulated GPU every time is None: there is none."""
    device, run = records.device_name(trainer.world.device), trainer.task.run
    config = as_run(run).flat()
    record = {
        **records.heading(device),
        "task": args.task,
        "threads": torch.get_num_threads(),
        "peaks": records.peaks_of(device, args.gpu),
        "config": config | {"data_root": Path(config["data_root"]).name},
        "updates": args.updates,
        "warmup": args.warmup,
        "images": trainer.stream.num_images,
        "peak GiB": rows[-1]["peak_memory_gib"],
        "model GFLOP per image": model_flops(as_run(run)) / 1e9,
    }
    if marker():
        return record | dict.fromkeys(("images/s", "percentiles", "mfu", "data wait"))
    images = config["batch_size"] * config["accum_iter"]
    return record | times(images, rows) | {"mfu": mfu(record, times(images, rows)["images/s"])}


def times(images: int, rows: list[dict]) -> dict:
    """images/s, percentiles of an update's seconds, and the share of time waiting for data, of updates of so many images."""
    seconds = [images / row["images_per_s"] for row in rows]
    waited = sum(s * row["data_wait"] for s, row in zip(seconds, rows))
    rate = images / statistics.mean(seconds)
    return {"images/s": rate, "percentiles": records.percentiles(seconds), "data wait": waited / sum(seconds)}


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
    config, how = record["config"], "on" if record["config"]["compile"] else "off"
    size = "{model} {input_size}/{patch_size}, batch {batch_size} x {accum_iter}, {precision}".format(**config)
    yield f"{size}, compile {how}; {record['device']}; {record['images']} images ({config['data_root']})"
    yield f"{record['updates']} updates after {record['warmup']}; peak {record['peak GiB']:.2f} GiB"
    if record["images/s"] is None:
        yield "a simulated GPU: no times; the run went through"
        return
    fast, slow = (record["percentiles"][key] * 1e3 for key in ("20", "80"))
    yield f"{record['images/s']:.1f} images/s; update {fast:.1f} to {slow:.1f} ms (20th to 80th percentile)"
    ratio = "unknown" if record["mfu"] is None else f"{record['mfu']:.1%}"
    yield f"MFU {ratio} of {record['model GFLOP per image']:.2f} GFLOP per image; data wait {record['data wait']:.1%}"
