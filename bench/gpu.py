"""python -m bench gpu: all of what a GPU can tell, in one go with a summary: capture, tests, kernels, steps, data, training."""

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

from bench import records
from bench.simulated_gpu import marker
from bench.steps import DEFAULTS, FINETUNE, PRETRAIN, variants
from mimir_fast.checkpoints.atomic import write_text_atomically

GROUPS = ("tune", "capture", "tests", "kernels", "step", "finetune", "data", "train", "profile")
FLAGS = ["--residual_dtype", "bf16"]  # of docs/performance.md
ATTACKS = (1, 10)  # steps of the fine-tuning steps
TESTS = ("tests/kernels/test_devices.py", "tests/runs/test_gpu.py")
MINUTES, COMPILED = 8.0, 40  # by default; seconds of a step that is compiled first, out of them
MARGIN = 0.8  # of the limit is what a command is told: its processes have to start
GRACE = 5.0  # seconds between asking a process to end and ending it
SHOWN = 20  # lines of a log that the summary shows
EPILOG = f"""Other flags are pre-training's (default: {" ".join(FLAGS)}, which the fine-tuning steps always have).
Each stage is a process of its own with its part of the time; what fails or takes too long is reported and the rest goes on.
summary.md is written anew after every stage, records as soon as they are there.
Exit status: 0 all stages ok, 1 not all, 2 wrong input or no GPU, 130 Ctrl-C."""


class Stage(NamedTuple):
    """One command.  share: its part of the time [any unit]."""

    name: str
    command: list[str]
    share: float


class Outcome(NamedTuple):
    """How a stage went: ok, failed or over time; seconds taken and allowed; what it printed."""

    name: str
    status: str
    seconds: float
    limit: float
    told: list[str]


def build_parser() -> argparse.ArgumentParser:
    parser = records.parser("gpu", __doc__, EPILOG)
    add = parser.add_argument
    names = partial(add, type=records.words, metavar="A,B")
    add("--minutes", type=float, default=MINUTES, help="for everything together (default: %(default)g)")
    add("--data_root", default="", help="folder of class folders with images (default: synthetic JPEG files)")
    names("--models", default="mae_vit_base,mae_vit_small", help="the first trains, all are priced (%(default)s)")
    names("--only", default=",".join(GROUPS), help="these stages only (default: %(default)s)")
    add("--output", default="runs/bench_gpu", metavar="FOLDER", help="logs, trace, summary.md (default: %(default)s)")
    add("--results", default=str(records.RESULTS), metavar="FOLDER", help="of JSON lines (default: %(default)s)")
    return parser


def run(args: argparse.Namespace, flags: list[str]) -> int:
    """Run the stages and print the page; returns the exit status.  Raises ValueError naming what is missing or wrong."""
    unknown = [name for name in args.only if name not in GROUPS]
    if unknown or not args.only:
        raise ValueError(f"only: expected some of {', '.join(GROUPS)}, got {', '.join(unknown) or 'nothing'}")
    if args.minutes <= 0:
        raise ValueError(f"minutes: expected more than 0, got {args.minutes:g}")
    if not torch.cuda.is_available():
        raise ValueError("device: no CUDA device here; --simulate h100 runs everything on a simulated one")
    args.output, args.results = Path(args.output).resolve(), Path(args.results).resolve()
    stages, heading = plan(args, flags or FLAGS), records.heading(records.device_name(torch.device("cuda")))
    summary, outcomes, ends = args.output / "summary.md", [], time.monotonic() + args.minutes * 60
    args.output.mkdir(parents=True, exist_ok=True)
    try:
        for number, stage in enumerate(stages, 1):
            # what one leaves over goes to those after it
            left = max(ends - time.monotonic(), 0.0)
            limit = left * stage.share / sum(later.share for later in stages[number - 1 :])
            print(f"[{number}/{len(stages)}] {stage.name}: at most {limit:.0f} s of {left:.0f} s left", flush=True)
            outcomes.append(run_one(stage, limit, args.output / f"{number:02d}-{stage.name.replace(' ', '-')}.log"))
            print(f"[{number}/{len(stages)}] {stage.name}: {outcomes[-1].status}", flush=True)
            write_text_atomically(summary, page(outcomes, len(stages), heading), "output")
    except KeyboardInterrupt:
        print(f"python -m bench gpu: stopped; what was done is in {args.output}", file=sys.stderr)
        return 130
    print(f"\n{summary.read_text()}\nsummary: {summary}; records: {args.results}")
    return int(any(o.status != "ok" for o in outcomes))


def plan(args: argparse.Namespace, flags: list[str]) -> list[Stage]:
    """The stages in order, those of args.only.  flags: pre-training's, for step, train and profile."""
    workers = ["--num_workers", str(max((os.cpu_count() or 1) - 1, 1))]
    loop = ["--data_root", args.data_root, "--model", args.models[0], *workers, *flags]
    found: list[Stage] = []

    def add(name: str, share: float, verb: str, *words: str) -> None:
        results = [] if verb in ("profile", "capture") else ["--results", f"{args.results / verb}.jsonl"]
        found.append(Stage(name, [sys.executable, "-m", "bench", verb, *results, *words], share))

    for model in args.models if not marker() else ():  # what all others then compute with
        words = [*DEFAULTS[PRETRAIN], "--model", model, *flags]
        found.append(Stage(f"tune {model}", [sys.executable, "-m", "mimir_fast.cli", "tune", *words], COMPILED))
    # whether a captured step computes what the others compute
    add("capture", COMPILED, "capture", "--model", args.models[-1], *flags)
    if not marker():  # a simulated GPU computes nothing
        found.append(Stage("tests", [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *TESTS], 80))
    add("kernels", 90, "kernels")
    for model in args.models:
        for variant in variants(model):
            share = COMPILED / (1 + (variant == "textbook"))  # which is not compiled
            add(f"step {model} {variant}", share, "step", "--variant", variant, "--model", model, *flags)
    tuned = args.models[0].removeprefix("mae_")
    for steps in ATTACKS:
        share = COMPILED / (1 + (steps != ATTACKS[0]))  # the second finds its code compiled
        words = ["--task", FINETUNE, "--model", tuned, "--steps", str(steps), *FLAGS]
        add(f"finetune {tuned} PGD-{steps}", share, "step", *words)
    add("data", 60, "data", "--data_root", args.data_root)
    add("train", 60, "train", *loop)
    add("profile", 45, "profile", "--output", str(args.output / "profile"), *loop)
    return [stage for stage in found if stage.name.split()[0] in args.only]


def run_one(stage: Stage, limit: float, log: Path) -> Outcome:
    """One stage; whatever it prints goes into the log."""
    started, command = time.monotonic(), list(stage.command)
    if stage.name == "kernels":  # it can end by itself
        command += ["--seconds", f"{MARGIN * limit:.0f}"]
    with log.open("w") as out:
        process = subprocess.Popen(
            command, cwd=records.ROOT, start_new_session=True, stdin=subprocess.DEVNULL, stdout=out, stderr=out
        )
        try:
            status = "ok" if process.wait(limit) == 0 else "failed"
        except subprocess.TimeoutExpired:
            status = "over time"
        finally:
            _end(process)
    return Outcome(stage.name, status, time.monotonic() - started, limit, log.read_text(errors="replace").splitlines())


def _end(process: subprocess.Popen) -> None:
    """End what is left of the process and of everything it started."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(GRACE)


def page(outcomes: list[Outcome], planned: int, heading: dict) -> str:
    """Markdown of the outcomes so far, out of `planned` stages, each with the end of what it printed."""
    bad = ", ".join(o.name for o in outcomes if o.status != "ok")
    head = "# {device}, commit {commit}\n\n{date}; torch {torch}, triton {triton}; ".format(**heading)
    lines = [f"{head}{len(outcomes)} of {planned} stages done{f'; NOT ok: {bad}' if bad else ''}."]
    if heading["device"].startswith(records.SIMULATED):
        lines.append("A simulated GPU: launches and memory are exact, nothing here is a measured time.")
    columns = "stage={name}; outcome={status}; seconds={seconds:.0f}; allowed={limit:.0f}"
    lines.append("\n" + records.table(columns, [o._asdict() for o in outcomes]))
    for o in outcomes:
        # without progress bars and the profiler's own lines
        told = [line for line in o.told if "%|" not in line and not line.startswith("USDT:")]
        lines.append("\n".join([f"\n## {o.name}: {o.status}\n\n```", *told[-SHOWN:], "```"]))
    return "\n".join(lines) + "\n"
