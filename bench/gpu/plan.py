"""The stages of `bench gpu`: the commands, and each one's share of the time."""

import argparse
import os
import sys
from dataclasses import dataclass
from pathlib import Path

from bench.peaks import PEAKS
from bench.rows import FINETUNE
from bench.step.variants import VARIANTS

GROUPS = ("tests", "peaks", "kernels", "step", "finetune", "train", "profile")
FLAGS = ["--residual_dtype", "bf16"]  # of docs/performance.md
ATTACKS = (1, 10)  # steps of the fine-tuning steps
TESTS = ("tests/kernels/test_devices.py", "tests/runs/test_gpu.py")
COMPILED = 40  # seconds of a step that is compiled first, out of DEFAULT_MINUTES
DEFAULT_MINUTES = 8.0


@dataclass(frozen=True)
class Stage:
    """One command.  share: its part of the time [any unit]; results: the JSON lines it appends to; why: not to be run.

    told: the command ends by itself if --seconds tells it how long it may take.
    """

    name: str
    group: str
    command: list[str]
    share: float
    results: Path | None = None
    why: str = ""
    told: bool = False


def plan(args: argparse.Namespace, flags: list[str]) -> list[Stage]:
    """The stages in order, those of args.only.  flags: pre-training's, for step, train and profile."""
    python, bench = sys.executable, [sys.executable, "-m", "bench"]
    results = Path(args.results)
    prefix = _pretended(args)
    sizes = ["--batch", str(args.batch), "--input_size", str(args.input_size), "--patch_size", str(args.patch_size)]
    loop = [*sizes, "--model", args.models[0], "--data_root", args.data_root]
    after = ["--", "--num_workers", str(_workers()), *flags]
    profile = ["--output", str(Path(args.output) / "profile")]
    pytest = [python, "-m", "pytest", "-p", "no:cacheprovider", *TESTS]
    values = "" if not args.pretend else "a pretend GPU computes nothing"

    def record(name: str) -> list[str]:
        return ["--results", str(results / f"{name}.jsonl")]

    stages = [
        Stage("tests", "tests", pytest, 80, why=values),
        Stage(
            "peaks", "peaks", [*prefix, python, "-m", "bench.gpu.peaks", *record("peaks")], 15, results / "peaks.jsonl"
        ),
        Stage(
            "kernels",
            "kernels",
            [*prefix, *bench, "kernels", "--device", "cuda", *record("kernels")],
            75,
            results / "kernels.jsonl",
            told=True,
        ),
        *(step for model in args.models for step in _steps(args, model, [*sizes, *record("step")], flags)),
        *_tuning(args, record("step")),
        Stage(
            "train", "train", [*prefix, *bench, "train", *loop, *record("train"), *after], 60, results / "train.jsonl"
        ),
        Stage("profile", "profile", [*prefix, *bench, "profile", *loop, *profile, *after], 45),
    ]
    return [stage for stage in stages if stage.group in args.only]


def _steps(args: argparse.Namespace, model: str, words: list[str], flags: list[str]) -> list[Stage]:
    """`bench step` in every variant; the textbook's is not compiled."""
    pretend = ["--pretend", args.pretend] if args.pretend else []
    stages = []
    for variant in VARIANTS:
        own = ["--model", model, "--variant", variant, *words, *pretend]
        command = [sys.executable, "-m", "bench", "step", *own, *(["--", *flags] if flags else [])]
        share = COMPILED / 2 if variant == "textbook" else COMPILED
        stages.append(Stage(f"step {model} {variant}", "step", command, share, Path(args.results) / "step.jsonl"))
    return stages


def _tuning(args: argparse.Namespace, results: list[str]) -> list[Stage]:
    """`bench step` of the first model's fine-tuning, half the batch; the second attack finds its code compiled."""
    model, stages = args.models[0].removeprefix("mae_"), []
    for steps in ATTACKS:
        own = ["--task", FINETUNE, "--model", model, "--steps", str(steps), "--batch", str(max(args.batch // 2, 1))]
        own += ["--input_size", str(args.input_size), "--patch_size", str(args.patch_size), *results]
        own += ["--pretend", args.pretend] if args.pretend else []
        command = [sys.executable, "-m", "bench", "step", *own, "--", *FLAGS]
        share = COMPILED if steps == ATTACKS[0] else COMPILED / 2
        stages.append(
            Stage(f"finetune {model} PGD-{steps}", "finetune", command, share, Path(args.results) / "step.jsonl")
        )
    return stages


def _pretended(args: argparse.Namespace) -> list[str]:
    """What goes before a command to run it on a pretend H100."""
    if not args.pretend:
        return []
    peak = PEAKS["h100"]
    machine = ["--arch", str(peak.arch), "--mem-mb", str(peak.memory_mib)]
    return [str(Path(args.pretend).resolve()), *machine, "--log", str(Path(args.output) / "launches.log")]


def _workers() -> int:
    return max((os.cpu_count() or 1) - 1, 1)
