"""python -m bench kernels: every operation against its rivals, at the shapes of the recipes, checked and then timed."""

import argparse
import itertools
import os
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from bench.harness import CudaClock, WallClock, cache_bytes, reached
from bench.kernels import table
from bench.kernels.cases import DIRECTIONS, IMPLS, Setting, records
from bench.kernels.suite import OPS, SIZES, Entry, entries
from bench.pretend import start_under
from bench.records import RESULTS, append, heading
from bench.step.counts import pretend_gpu
from bench.step.peaks import PEAKS

ON_GPU = {"recipes": "imagenet_vit_b,imagenet_vit_s,cifar10_vit_s,imagenet_vit_l", "dtypes": "bf16,fp16,fp32"}
ON_CPU = {"recipes": "small", "dtypes": "fp32"}
SAME = {"impls": ",".join(IMPLS), "directions": ",".join(DIRECTIONS)}
SECONDS = {"cuda": 1.0, "cpu": 0.2}  # of timing per direction
EPILOG = f"""operations: {", ".join(OPS)}
recipes: {", ".join(SIZES)} (default: {ON_GPU["recipes"]}; on CPUs {ON_CPU["recipes"]})
dtypes: {ON_GPU["dtypes"]} (default: all; on CPUs {ON_CPU["dtypes"]}); each recipe's usual dtype comes first
impls: ours (GPUs only), eager and compiled (the reference under torch.compile), others (what else is installed)

A contender is first compared with the reference in float64 on the same inputs: what is off by more than twice eager's error
plus one rounding is reported as wrong and not timed.  Inputs rotate, so that none is in the second-level cache; contenders take
turns.  ms: median, 20th and 80th percentile.  GB/s (1e9 bytes), TFLOP/s (1e12, a multiply-add is two): what the operation must
move and compute, over the time.  peak: the share of what a plain copy and plain matrix products reach on this device, measured
at the start; dense solves are not counted.  Exit status: 0, 1 if a contender failed or is wrong, 2 wrong input, 130 Ctrl-C."""


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench kernels",
        description=__doc__.split(": ", 1)[1],
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("ops", nargs="*", metavar="op", default=[], help="operations (default: all)")
    for name in ("recipes", "dtypes", "impls", "directions"):
        add(f"--{name}", type=_words, metavar="A,B", help=SAME.get(name) and f"(default: {SAME[name]})")
    add("--seconds", type=float, help="stop before a case that would go past this; the most important come first")
    add("--device", choices=("cuda", "cpu"), help="default: cuda where it is there; on a cpu the references are timed")
    add("--pretend", metavar="WRAPPER", help="run on a pretend GPU: path of the program that provides one; no times")
    default = str(RESULTS / "kernels.jsonl")
    add("--results", default=default, metavar="FILE", help="JSON lines to append to (default: %(default)s)")
    add("--first", type=int, default=0, help=argparse.SUPPRESS)  # set when the command starts itself again
    return parser


def main(arguments: list[str]) -> int:
    """Print the tables, append every record as soon as it is there; returns the exit status."""
    args = build_parser().parse_args(arguments)
    try:
        if args.pretend and not pretend_gpu():
            again = [sys.executable, "-m", "bench", "kernels", *arguments]
            return start_under(args.pretend, "h100", os.devnull, again)
        found = chosen(args)
        return run(args, found, arguments)
    except ValueError as error:
        print(f"python -m bench kernels: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"python -m bench kernels: stopped; what was done is in {args.results}", file=sys.stderr)
        return 130


def chosen(args: argparse.Namespace) -> list[Entry]:
    """The cases asked for; fills in the defaults.  Raises ValueError naming the wrong word."""
    if args.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device: no CUDA device here; --pretend WRAPPER runs everything on a pretend GPU")
    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    for name, default in {**(ON_GPU if args.device == "cuda" else ON_CPU), **SAME}.items():
        if getattr(args, name) is None:
            setattr(args, name, _words(default))
    for name, allowed in (("impls", IMPLS), ("directions", DIRECTIONS)):
        unknown = [word for word in getattr(args, name) if word not in allowed]
        if unknown or not getattr(args, name):
            raise ValueError(f"{name}: expected some of {', '.join(allowed)}; got {', '.join(unknown) or 'nothing'}")
    if args.seconds is not None and args.seconds <= 0:
        raise ValueError(f"seconds: expected more than 0, got {args.seconds:g}")
    return entries(args.ops or list(OPS), args.recipes, args.dtypes)
