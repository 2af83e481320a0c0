"""Training loss in plain fp32, over seeds, and with the 16-bit options, on the same images and random draws.

    python -m bench losses --data_root FOLDER --steps 300 --seeds 3 -- --model mae_vit_ti --input_size 32 --patch_size 4

Every run is `mimir-fast pretrain`, from data to optimizer; flags after -- are passed on.  On a CPU the 16-bit runs compute
matrix products and attention as a tensor core does, 16-bit numbers in, fp32 sums, a 16-bit result, but in fp32 arithmetic: the
CPU's own 16-bit products are many times slower.  Triton kernels and torch.compile are then left to the tests.
"""

import argparse
import contextlib
import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from bench.records import RESULTS, append, heading, partition
from mimir_fast.cli import pretrain

DEFAULTS = (
    "--attack pgd_mae --mi_train hsic --norm_pix_loss --num_workers 0 --log_every 20 --checkpoint_steps 0 --log_dir="
)
RUNS = {
    "fp32": "--precision fp32",
    "bf16": "--precision bf16",
    "bf16, bf16 residual": "--precision bf16 --residual_dtype bf16",
}
WINDOW = 20  # updates that one point of a trace is the mean of
HALF = (torch.bfloat16, torch.float16)
PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "_scaled_dot_product_flash_attention_for_cpu")


class ProductsInFp32(TorchDispatchMode):
    """Matrix products and attention of 16-bit CPU tensors: computed in fp32, the results rounded to 16 bits."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func._schema.name.removeprefix("aten::").removesuffix("_backward")
        half = next((t.dtype for t in args if isinstance(t, Tensor) and t.dtype in HALF), None)
        if name not in PRODUCTS or half is None:
            return func(*args, **kwargs)
        wide = [t.float() if isinstance(t, Tensor) and t.dtype in HALF else t for t in args]
        result = func(*wide, **kwargs)
        if isinstance(result, Tensor):
            return result.to(half)
        if name == func._schema.name.removeprefix(
            "aten::"
        ):  # attention's forward: the logarithms of its sums stay fp32
            return result[0].to(half), *result[1:]
        return tuple(gradient.to(half) for gradient in result)


def trace(words: list[str], device: str) -> np.ndarray:
    """Reconstruction loss of every update of a pre-training with these flags."""
    half = contextlib.nullcontext() if device != "cpu" or "fp32" in words else ProductsInFp32()
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr), half:
        if pretrain.main([*words, "--device", device, "--output_dir", folder]):
            raise ValueError("flags: the pre-training above did not run")
        lines = (Path(folder) / "metrics.jsonl").read_text().splitlines()
    return np.array([json.loads(line)["recon"] for line in lines])


def compare(traces: dict[str, list[np.ndarray]]) -> dict:
    """Means over windows; what seeds change in fp32 and what precision changes for the first seed, largest and mean."""
    points = {name: np.array([_windows(run) for run in runs]) for name, runs in traces.items()}
    plain = points["fp32"]
    record = {"window": WINDOW, "points": {name: runs.tolist() for name, runs in points.items()}}
    spread = plain.max(axis=0) - plain.min(axis=0)
    record["seed to seed"] = {"largest": spread.max(), "mean": spread.mean()}
    for name in points.keys() - {"fp32"}:
        difference = np.abs(points[name][0] - plain[0])
        record[name] = {"largest": difference.max(), "mean": difference.mean()}
    return record


def _windows(run: np.ndarray) -> np.ndarray:
    whole = len(run) // WINDOW * WINDOW
    return run[:whole].reshape(-1, WINDOW).mean(axis=1)


def main(arguments: list[str]) -> int:
    """Run, print, append to the results; returns the exit status: 0, or 2 with one line on wrong input."""
    own, flags = partition(arguments)
    parser = argparse.ArgumentParser(prog="python -m bench losses", description=__doc__.splitlines()[0])
    parser.add_argument("--data_root", required=True, help="folder of class folders with images")
    parser.add_argument("--steps", type=int, default=300, help="updates of each run (default: 300)")
    parser.add_argument("--seeds", type=int, default=3, help="fp32 runs with seeds 0, 1, ... (default: 3)")
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=default, help="cuda or cpu (default: cuda if there is one)")
    parser.add_argument("--results", default=str(RESULTS / "losses.jsonl"), help="JSON lines to append to")
    args = parser.parse_args(own)
    words = [*DEFAULTS.split(), "--data_root", args.data_root, "--max_steps", str(args.steps), *flags]
    traces = {}
    try:
        if args.seeds < 2 or args.steps < WINDOW:
            raise ValueError(
                f"seeds, steps: expected 2 or more and {WINDOW} or more, got {args.seeds} and {args.steps}"
            )
        for name, options in RUNS.items():
            seeds = range(args.seeds if name == "fp32" else 1)
            traces[name] = [trace([*words, *options.split(), "--seed", str(s)], args.device) for s in seeds]
    except ValueError as error:
        print(f"python -m bench losses: error: {error}", file=sys.stderr)
        return 2
    device = torch.cuda.get_device_name() if args.device != "cpu" else "cpu"
    record = {**heading(device), "flags": words[len(DEFAULTS.split()) + 2 :], **compare(traces)}
    for line in report(record):
        print(line)
    append(record, Path(args.results))
    return 0


def report(record: dict) -> list[str]:
    """One row per window, then the differences."""
    points = {f"{name} seed {seed}": run for name, runs in record["points"].items() for seed, run in enumerate(runs)}
    lines = ["update  " + "  ".join(points)]
    for window, values in enumerate(zip(*points.values())):
        numbers = "  ".join(f"{value:{len(name)}.4f}" for name, value in zip(points, values))
        lines.append(f"{(window + 1) * record['window']:6d}  {numbers}")
    for name in ("seed to seed", *(name for name in record["points"] if name != "fp32")):
        largest, mean = record[name]["largest"], record[name]["mean"]
        lines.append(f"{name}: differs by at most {largest:.4f}, by {mean:.4f} on average")
    return lines
