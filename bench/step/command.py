"""python -m bench step: price one training step against a GPU's limits; measure it too where the GPU is there."""

import argparse
import contextlib
import sys
import tempfile
from pathlib import Path

import torch

from bench.peaks import PEAKS, peak_of
from bench.pretend import start_under
from bench.records import RESULTS, append, heading, partition
from bench.rows import PRETRAIN
from bench.step import counts, table
from bench.step.roofline import roofline_on_gpu, roofline_on_pretend_gpu
from bench.step.variants import DEFAULTS, VARIANTS, StepConfig, configuration, fill_in

EPILOG = """Trainer flags may follow --, for instance: python -m bench step --batch 256 -- --mask_ratio 0.6
finetune is adversarial training of the classifier (PGD, eps 4/255), as mimir-fast finetune --recipe imagenet_vit_s does it.
Units: GB 1e9 bytes, GiB 2**30 bytes, TFLOP 1e12 operations (a multiply-add is two), ms of one step; syncs, copies: per step.
Bounds are what the calls of this step cannot undercut at the GPU's peaks; they are no predictions.  Only "measured" lines, on
a real GPU, are measurements."""


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench step",
        description=__doc__.split(": ", 1)[1],
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--task", choices=list(DEFAULTS), default=PRETRAIN, help="whose step (default: %(default)s)")
    add("--model", help="model name (default: mae_vit_base; fine-tuning: vit_base)")
    add("--batch", type=int, help="images per step (default: 512; fine-tuning: 256)")
    add("--steps", type=int, default=1, help="steps of the attack (default: %(default)s)")
    add("--input_size", type=int, default=224, help="image side [pixels] (default: %(default)s)")
    add("--patch_size", type=int, default=16, help="patch side [pixels] (default: %(default)s)")
    add("--variant", choices=VARIANTS, default="ours", help="which step (default: ours, as the trainer builds it)")
    add("--gpu", choices=list(PEAKS), help="whose peaks (default: the GPU found; h100 on a pretend one)")
    add("--pretend", metavar="WRAPPER", help="run on a pretend GPU: path of the program that provides one")
    add("--rounds", type=int, default=20, help="measured steps on a real GPU (default: %(default)s)")
    default = str(RESULTS / "step.jsonl")
    add("--results", default=default, metavar="FILE", help="JSON lines to append to (default: %(default)s)")
    add("--pretend_log", help=argparse.SUPPRESS)  # where the wrapper writes; set when this program starts itself again
    add("flags", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    return parser


def main(arguments: list[str]) -> int:
    """Print the table and append the record; returns the exit status: 0, or 2 with one line on wrong input."""
    own, flags = partition(arguments)
    args = build_parser().parse_args(own)
    fill_in(args)
    try:
        if args.flags:
            raise ValueError(f"arguments: {args.flags[0]!r} is not known; trainer flags come after --")
        for name in ("batch", "steps", "rounds"):
            if getattr(args, name) < 1:
                raise ValueError(f"{name}: expected 1 or more, got {getattr(args, name)}")
        if args.pretend and not args.pretend_log:
            return start_again(args, arguments)
        return run(args, flags)
    except ValueError as error:
        print(f"python -m bench step: error: {error}", file=sys.stderr)
        return 2


def start_again(args: argparse.Namespace, arguments: list[str]) -> int:
    """Run this command once more under the pretend GPU's wrapper.  Raises ValueError if the wrapper is not there."""
    with tempfile.TemporaryDirectory() as folder:
        log = f"{folder}/launches.log"
        again = [sys.executable, "-m", "bench", "step", "--pretend_log", log, *arguments]
        return start_under(args.pretend, args.gpu or "h100", log, again)


def run(args: argparse.Namespace, flags: list[str]) -> int:
    if not torch.cuda.is_available():
        raise ValueError("device: no CUDA device here; --pretend WRAPPER runs the step on a pretend GPU")
    mark = counts.pretend_gpu()
    if mark and not args.pretend_log:
        raise ValueError("pretend: this is a pretend GPU already; pass --pretend WRAPPER instead of starting under it")
    gpu = args.gpu or ("h100" if mark else peak_of(torch.cuda.get_device_name()))
    config = configured(args, flags)
    with contextlib.redirect_stdout(sys.stderr):  # Inductor prints the names of the files it writes
        if mark:
            roofline = roofline_on_pretend_gpu(args.variant, config, PEAKS[gpu], mark, Path(args.pretend_log))
        else:
            roofline = roofline_on_gpu(args.variant, config, PEAKS[gpu], args.rounds)
    device = f"pretend-{gpu}" if mark else torch.cuda.get_device_name()
    what = {"task": args.task, "peaks": gpu, "variant": args.variant, "config": config.flat()}
    record = {**heading(device), **what, **roofline.record()}
    print(f"{args.task}, {args.variant}: {args.model} {args.input_size}/{args.patch_size}, batch {args.batch}, "
          f"attack {config.attack.steps} step(s), {config.compute.precision}, "
          f"compile {'on' if config.compute.compile else 'off'}; {device}")  # fmt: skip
    print(f"peaks of {gpu}: {PEAKS[gpu].source}\n")
    print(*table.lines(record), sep="\n")
    append(record, Path(args.results))
    return 0


def configured(args: argparse.Namespace, flags: list[str]) -> StepConfig:
    """The trainer's configuration; its own flags win."""
    sizes = {
        "model": args.model,
        "batch_size": args.batch,
        "input_size": args.input_size,
        "patch_size": args.patch_size,
        "steps": args.steps,
    }
    words = [word for name, value in sizes.items() for word in (f"--{name}", str(value))]
    return configuration(args.variant, [*words, "--device", "cuda", *flags], args.task)
