"""python -m bench step: price one training step against a GPU's limits; measure it too where the GPU is there."""

import argparse
import contextlib
import sys

import torch

from bench import records, steps
from bench.peaks import PEAKS, peak_of
from bench.simulated_gpu import marker
from bench.step import roofline

EPILOG = """Other flags are the trainer's, for instance: python -m bench step --batch_size 256 --mask_ratio 0.6
finetune is adversarial training of the classifier (PGD, eps 4/255), as mimir-fast finetune --recipe imagenet_vit_s does it.
Units: GB 1e9 bytes, GiB 2**30 bytes, TFLOP 1e12 operations (a multiply-add is two), ms of one step; syncs, copies: per step.
Bounds are what the calls of this step cannot undercut at the GPU's peaks; they are no predictions.  Only "measured" lines, on
a real GPU, are measurements."""


def build_parser() -> argparse.ArgumentParser:
    parser = records.parser("step", __doc__, EPILOG, "step.jsonl")
    steps.add_arguments(parser)
    add = parser.add_argument
    add(
        "--variant", choices=steps.VARIANTS, default="ours", help="which step (default: ours, as the trainer builds it)"
    )
    return parser


def run(args: argparse.Namespace, flags: list[str]) -> int:
    """Print the table and append the record; raises ValueError naming what is wrong."""
    if not torch.cuda.is_available():
        raise ValueError("device: no CUDA device here; --simulate h100 runs the step on a simulated one")
    device = records.device_name(torch.device("cuda"))
    gpu = args.gpu or peak_of(device)
    config = steps.configuration(args.task, ["--device", "cuda", *flags], args.variant)
    with contextlib.redirect_stdout(sys.stderr):  # Inductor prints the names of the files it writes
        found = roofline.summary(run_step(args.variant, config), PEAKS[gpu], config.flat()["batch_size"])
    what = {"task": args.task, "peaks": gpu, "variant": args.variant, "config": config.flat()}
    record = {**records.heading(device), **what, **found}
    size = "{model} {input_size}/{patch_size}, batch {batch_size}, attack {steps} step(s), {precision}"
    compiled = f"compile {'on' if config.flat()['compile'] else 'off'}"
    print(f"{args.task}, {args.variant}: {size.format(**config.flat())}, {compiled}; {device}")
    print(f"peaks of {gpu}: {PEAKS[gpu].source}\n", *roofline.lines(record), sep="\n")
    records.append(record, args.results)
    return 0


def run_step(variant: str, config: steps.StepConfig) -> roofline.Step:
    """The step, run here and priced: on a real GPU with its time."""
    torch._inductor.config.benchmark_kernel = True  # every generated kernel then carries its byte count
    steps.leave_cudnn_out()
    with steps.ConvolutionStandIn() if marker() and variant == "textbook" else contextlib.nullcontext():
        update = steps.build_step(variant, config, torch.device("cuda"))
        with update.context:
            return roofline.on_simulated_gpu(update) if marker() else roofline.on_gpu(update)
