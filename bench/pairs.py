"""Images per second of the pre-training step against the textbook step, in pairs in one process.

    python -m bench pairs --model mae_vit_ti --input_size 32 --patch_size 4 --batch_size 32

Both steps attack (1 PGD step), run forward and backward, and add the penalty; ours through mimir_fast, the other through
bench/textbook.py (all patches embedded, tokens gathered afterwards, einsum patches, penalty by matrix inverses).  Rounds
alternate, so that a drifting machine slows both; the ratio is taken pair by pair.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

import torch

from bench.records import RESULTS, append, heading
from bench.textbook import TextbookMAE, textbook_step
from mimir_fast.attacks.pgd_mae import MaeAttackFunctions, frozen_twin, linf_bounds, reconstruction, starting_point
from mimir_fast.config.resolve import missing_compiler
from mimir_fast.kernels import linf_patch_step
from mimir_fast.models import create_model
from mimir_fast.models.families import find, model_names
from mimir_fast.objectives.reconstruction import ReconstructionObjective
from mimir_fast.training.compilation import Compiler
from mimir_fast.training.pretrain_step import MaeAttack, draw_noise, pretrain_step

EPS, ALPHA, RATIO, WEIGHT = 8 / 255, 10 / 255, 0.75, 1e-5


def seconds(step, device: torch.device) -> float:
    """Wall time of one call, the device drained before and after."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def build_steps(args: argparse.Namespace, device: torch.device):
    """The two steps as functions without arguments: forward and backward of one random batch, gradients cleared."""
    size = {"img_size": args.input_size, "patch_size": args.patch_size, "norm_pix_loss": True}
    attention = "narrow" if args.compile and device.type == "cpu" else "auto"
    ours = create_model(args.model, attention=attention, **size).to(device)
    textbook = TextbookMAE(**find(args.model, pretraining=True)[1], **size).to(device)
    textbook.load_state_dict(ours.state_dict())
    images = torch.rand(args.batch_size, 3, args.input_size, args.input_size, device=device)
    generator = torch.Generator(device).manual_seed(0)
    attack = MaeAttack(1, linf_bounds(EPS, ALPHA, 0.0, 1.0, 3, device))
    twin, compiler = frozen_twin(ours), Compiler(args.compile)
    encode, reconstruct = compiler.trained(ours.encode), compiler.trained(ours.reconstruct)
    objective = ReconstructionObjective(ours, RATIO, "hsic", WEIGHT, encode, reconstruct)
    pieces = (
        compiler.attacked(reconstruction),
        compiler.operation(starting_point),
        compiler.operation(linf_patch_step),
    )
    functions = MaeAttackFunctions(*pieces)

    def our_step() -> None:
        noise = draw_noise(generator, *ours.noise_shape(len(images)), attack)
        pretrain_step(objective, twin, images, noise, attack, functions).loss.backward()
        ours.zero_grad(set_to_none=True)

    def their_step() -> None:
        textbook_step(textbook, images, EPS, ALPHA, RATIO, WEIGHT).backward()
        textbook.zero_grad(set_to_none=True)

    return our_step, their_step


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench pairs", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--model", default="mae_vit_ti", choices=model_names(pretraining=True), help="model (default: mae_vit_ti)"
    )
    parser.add_argument("--input_size", type=int, default=32, help="image side [pixels] (default: 32)")
    parser.add_argument("--patch_size", type=int, default=4, help="patch side [pixels] (default: 4)")
    parser.add_argument("--batch_size", type=int, default=32, help="images per step (default: 32)")
    parser.add_argument("--rounds", type=int, default=7, help="timed pairs after one warm-up pair (default: 7)")
    parser.add_argument("--compile", action="store_true", help="compile our step; the textbook's stays eager")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: cpu)")
    default = str(RESULTS / "pairs.jsonl")
    parser.add_argument("--results", default=default, help="JSON lines to append to (default: %(default)s)")
    args = parser.parse_args(arguments)
    try:
        check(args)
    except ValueError as error:
        print(f"python -m bench pairs: error: {error}", file=sys.stderr)
        return 2
    device = torch.device(args.device)
    steps = build_steps(args, device)
    pairs = [[seconds(step, device) for step in steps] for _ in range(args.rounds + 1)][1:]
    record = measured(args, device, pairs)
    how = "ours compiled, textbook eager" if args.compile else "both eager"
    size = f"{args.model} {args.input_size}/{args.patch_size}, batch {args.batch_size}"
    print(f"{size}, fp32, {how}; {record['device']}, {record['threads']} threads, {args.rounds} pairs")
    for name, rate in record["images/s"].items():
        print(f"{name:<11} median {rate:8.1f} images/s")
    ratios = record["ratios"]
    print(f"speed ratio median {record['ratio']:.2f} (from {ratios[0]:.2f} to {ratios[-1]:.2f})")
    append(record, Path(args.results))
    return 0


def check(args: argparse.Namespace) -> None:
    """Raises ValueError naming what is wrong or missing."""
    for name in ("rounds", "batch_size", "input_size", "patch_size"):
        if getattr(args, name) < 1:
            raise ValueError(f"{name}: got {getattr(args, name)}, expected 1 or more")
    if args.input_size % args.patch_size:
        raise ValueError(f"patch_size: got {args.patch_size}, expected a divisor of input_size {args.input_size}")
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError("device: no CUDA device here; leave --device out")
    if args.compile and (reason := missing_compiler()):
        raise ValueError(f"compile: {reason}; leave --compile out")


def measured(args: argparse.Namespace, device: torch.device, pairs: list[list[float]]) -> dict:
    """The record of these pairs of seconds (ours, the textbook's)."""
    names = ("model", "input_size", "patch_size", "batch_size", "rounds", "compile")
    ratios = sorted(theirs / ours for ours, theirs in pairs)
    rates = [args.batch_size / statistics.median(times) for times in zip(*pairs)]
    return {
        **heading(torch.cuda.get_device_name() if device.type == "cuda" else "cpu"),
        "threads": torch.get_num_threads(),
        "config": {name: getattr(args, name) for name in names},
        "images/s": dict(zip(("mimir_fast", "textbook"), rates)),
        "ratio": statistics.median(ratios),
        "ratios": ratios,
    }
