"""python -m bench gpu: tests, peaks, kernels, steps, training loop and profile on one GPU, in one go, with a summary."""

import argparse
import sys
from pathlib import Path

import torch

from bench.gpu.plan import DEFAULT_MINUTES, FLAGS, GROUPS, plan
from bench.gpu.stages import Outcome, run_all
from bench.gpu.summary import page
from bench.records import RESULTS, heading, partition
from bench.step.counts import pretend_gpu

EPILOG = f"""Flags of pre-training may follow -- (default: {" ".join(FLAGS)}, which the fine-tuning steps always have).
Each stage is a process of its own with its part of the time; what fails or takes too long is reported and the rest goes on.
summary.md is written anew after every stage.
Exit status: 0 all stages ok, 1 not all, 2 wrong input or no GPU, 130 Ctrl-C."""


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench gpu",
        description=__doc__.split(": ", 1)[1],
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--minutes", type=float, default=DEFAULT_MINUTES, help="for everything together (default: %(default)g)")
    add("--data_root", default="", help="folder of class folders with images (default: synthetic JPEG files)")
    models = "mae_vit_base,mae_vit_small"
    add("--models", type=_words, default=models, help="the first one trains; all are priced (default: %(default)s)")
    add("--batch", type=int, default=512, help="images per step (default: %(default)s)")
    add("--input_size", type=int, default=224, help="image side [pixels] (default: %(default)s)")
    add("--patch_size", type=int, default=16, help="patch side [pixels] (default: %(default)s)")
    add("--only", type=_words, default=",".join(GROUPS), help="these stages only (default: %(default)s)")
    add("--pretend", metavar="WRAPPER", help="run on a pretend GPU: path of the program that provides one")
    add("--output", default="runs/bench_gpu", metavar="FOLDER", help="logs, trace, summary.md (default: %(default)s)")
    add("--results", default=str(RESULTS), metavar="FOLDER", help="JSON lines to append to (default: %(default)s)")
    return parser


def main(arguments: list[str]) -> int:
    """Run the stages and print the page; returns the exit status."""
    own, flags = partition(arguments)
    args = build_parser().parse_args(own)
    try:
        check(args)
    except ValueError as error:
        print(f"python -m bench gpu: error: {error}", file=sys.stderr)
        return 2
    args.output, args.results = Path(args.output).resolve(), Path(args.results).resolve()
    stages = plan(args, flags or FLAGS)
    machine = heading("pretend-h100" if args.pretend else "GPU")

    def write(outcomes: list[Outcome]) -> None:
        args.output.mkdir(parents=True, exist_ok=True)
        (args.output / "summary.md").write_text(page(outcomes, len(stages), machine))

    try:
        outcomes = run_all(stages, args.minutes * 60, args.output, write)
    except KeyboardInterrupt:
        print(f"python -m bench gpu: stopped; what was done is in {args.output}", file=sys.stderr)
        return 130
    print("\n" + page(outcomes, len(stages), machine))
    print(f"summary: {args.output / 'summary.md'}; records: {args.results}")
    return int(any(o.status in ("failed", "over time") for o in outcomes))


def check(args: argparse.Namespace) -> None:
    """Raises ValueError naming what is missing or wrong."""
    unknown = [name for name in args.only if name not in GROUPS]
    if unknown or not args.only:
        raise ValueError(f"only: expected some of {', '.join(GROUPS)}, got {', '.join(unknown) or 'nothing'}")
    if args.minutes <= 0:
        raise ValueError(f"minutes: expected more than 0, got {args.minutes:g}")
    if pretend_gpu():
        raise ValueError("pretend: this is a pretend GPU already; pass --pretend WRAPPER instead of starting under it")
    if args.pretend and not Path(args.pretend).is_file():
        raise ValueError(f"pretend: no file {args.pretend}; give the path of the pretend GPU's wrapper program")
    if not args.pretend and not torch.cuda.is_available():
        raise ValueError("device: no CUDA device here; --pretend WRAPPER runs everything on a pretend GPU")


def _words(text: str) -> list[str]:
    return [word for word in text.split(",") if word]
