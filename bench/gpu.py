"""python -m bench gpu: tests, kernels, steps, training loop and profile on one GPU, in one go, with a summary."""

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch

from bench import records
from bench.simulated_gpu import marker
from bench.steps import FINETUNE, PRETRAIN, VARIANTS
from bench.train import lines as train_lines

GROUPS = ("tests", "kernels", "step", "finetune", "train", "profile")
FLAGS = ["--residual_dtype", "bf16"]  # of docs/performance.md
ATTACKS = (1, 10)  # steps of the fine-tuning steps
TESTS = ("tests/kernels/test_devices.py", "tests/runs/test_gpu.py")
MINUTES, COMPILED = 8.0, 40  # by default; seconds of a step that is compiled first, out of them
MARGIN = 0.8  # of the limit is what a command is told: its processes have to start
GRACE = 5.0  # seconds between asking a process to end and ending it
SHOWN = 40  # lines of a log that the summary shows
EPILOG = f"""Flags of pre-training may follow -- (default: {" ".join(FLAGS)}, which the fine-tuning steps always have).
Each stage is a process of its own with its part of the time; what fails or takes too long is reported and the rest goes on.
summary.md is written anew after every stage, records as soon as they are there.
Exit status: 0 all stages ok, 1 not all, 2 wrong input or no GPU, 130 Ctrl-C."""


@dataclass(frozen=True)
class Stage:
    """One command.  share: its part of the time [any unit]; told: --seconds tells the command how long it may take.

    file: the JSON lines that it appends to; why: not to be run.
    """

    name: str
    group: str
    command: list[str]
    share: float
    file: Path | None = None
    why: str = ""
    told: bool = False


@dataclass(frozen=True)
class Outcome:
    """How a stage went: ok, failed, over time or skipped; seconds taken and allowed; its records and its log's last lines."""

    stage: Stage
    status: str
    seconds: float = 0.0
    limit: float = 0.0
    found: list[dict] = field(default_factory=list)
    tail: list[str] = field(default_factory=list)


def build_parser() -> argparse.ArgumentParser:
    parser = records.parser("gpu", __doc__, EPILOG)
    add = parser.add_argument
    add("--minutes", type=float, default=MINUTES, help="for everything together (default: %(default)g)")
    add("--data_root", default="", help="folder of class folders with images (default: synthetic JPEG files)")
    models = "mae_vit_base,mae_vit_small"
    add(
        "--models",
        type=records.words,
        default=models,
        help="the first one trains; all are priced (default: %(default)s)",
    )
    add("--batch", type=int, default=512, help="images per step (default: %(default)s)")
    add("--input_size", type=int, default=224, help="image side [pixels] (default: %(default)s)")
    add("--patch_size", type=int, default=16, help="patch side [pixels] (default: %(default)s)")
    add("--only", type=records.words, default=",".join(GROUPS), help="these stages only (default: %(default)s)")
    add("--output", default="runs/bench_gpu", metavar="FOLDER", help="logs, trace, summary.md (default: %(default)s)")
    add(
        "--results",
        default=str(records.RESULTS),
        metavar="FOLDER",
        help="JSON lines to append to (default: %(default)s)",
    )
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
    args.output.mkdir(parents=True, exist_ok=True)
    summary, outcomes, ends = args.output / "summary.md", [], time.monotonic() + args.minutes * 60
    try:
        for number, stage in enumerate(stages, 1):
            # what one leaves over goes to those after it
            left = max(ends - time.monotonic(), 0.0)
            limit = left * stage.share / sum(later.share for later in stages[number - 1 :])
            print(f"[{number}/{len(stages)}] {stage.name}: at most {limit:.0f} s of {left:.0f} s left", flush=True)
            outcomes.append(run_one(stage, limit, args.output / f"{number:02d}-{stage.name.replace(' ', '-')}.log"))
            print(f"[{number}/{len(stages)}] {stage.name}: {outcomes[-1].status}", flush=True)
            summary.write_text("\n".join(page(outcomes, len(stages), heading)) + "\n")
    except KeyboardInterrupt:
        print(f"python -m bench gpu: stopped; what was done is in {args.output}", file=sys.stderr)
        return 130
    print(f"\n{summary.read_text()}\nsummary: {summary}; records: {args.results}")
    return int(any(o.status in ("failed", "over time") for o in outcomes))


def plan(args: argparse.Namespace, flags: list[str]) -> list[Stage]:
    """The stages in order, those of args.only.  flags: pre-training's, for step, train and profile."""
    sizes = ["--batch", str(args.batch), "--input_size", str(args.input_size), "--patch_size", str(args.patch_size)]
    halved = ["--batch", str(max(args.batch // 2, 1)), *sizes[2:]]
    after = ["--", "--num_workers", str(max((os.cpu_count() or 1) - 1, 1)), *flags]
    loop = [*sizes, "--model", args.models[0], "--data_root", args.data_root]
    tuned, profile = args.models[0].removeprefix("mae_"), ["--output", str(Path(args.output) / "profile")]
    pytest = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *TESTS]

    def verb(
        name: str, group: str, share: float, *words: str, keeps: bool = True, after: list[str], told: bool = False
    ):
        file = Path(args.results) / f"{group if group != 'finetune' else 'step'}.jsonl" if keeps else None
        own = ["--results", str(file)] if keeps else []
        command = [sys.executable, "-m", "bench", file.stem if file else group, *words, *own, *after]
        return Stage(name, group, command, share, file, told=told)

    stages = [
        Stage("tests", "tests", pytest, 80, why="a simulated GPU computes nothing" if marker() else ""),
        verb("kernels", "kernels", 90, after=[], told=True),
    ]
    for model in args.models:
        for variant in VARIANTS:
            words = ["--task", PRETRAIN, "--model", model, "--variant", variant, *sizes]
            share = COMPILED / 2 if variant == "textbook" else COMPILED  # it is not compiled
            stages.append(verb(f"step {model} {variant}", "step", share, *words, after=["--", *flags]))
    for steps in ATTACKS:  # the second attack finds its code compiled
        words = ["--task", FINETUNE, "--model", tuned, "--steps", str(steps), *halved]
        share = COMPILED if steps == ATTACKS[0] else COMPILED / 2
        stages.append(verb(f"finetune {tuned} PGD-{steps}", "finetune", share, *words, after=["--", *FLAGS]))
    stages.append(verb("train", "train", 60, *loop, after=after))
    stages.append(verb("profile", "profile", 45, *loop, *profile, keeps=False, after=after))
    return [stage for stage in stages if stage.group in args.only]


def run_one(stage: Stage, limit: float, log: Path) -> Outcome:
    """One stage; whatever it prints goes into the log."""
    if stage.why:
        return Outcome(stage, "skipped", tail=[stage.why])
    before, started = len(_lines(stage.file)), time.monotonic()
    command = [*stage.command, *(["--seconds", f"{MARGIN * limit:.0f}"] if stage.told else [])]
    with log.open("w") as out:
        process = subprocess.Popen(
            command,
            cwd=records.ROOT,
            stdout=out,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            status = "ok" if process.wait(limit) == 0 else "failed"
        except subprocess.TimeoutExpired:
            status = "over time"
        finally:
            _end(process)
    found = [json.loads(line) for line in _lines(stage.file)[before:]]
    return Outcome(stage, status, time.monotonic() - started, limit, found, _lines(log)[-SHOWN:])


def _end(process: subprocess.Popen) -> None:
    """End what is left of the process and of everything it started."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(GRACE)


def _lines(file: Path | None) -> list[str]:
    return file.read_text(errors="replace").splitlines() if file and file.exists() else []


# ---- the page


def page(outcomes: list[Outcome], planned: int, heading: dict) -> Iterator[str]:
    """Markdown of the outcomes so far, out of `planned` stages."""
    bad = [o for o in outcomes if o.status in ("failed", "over time")]
    verdict = f"; NOT ok: {', '.join(o.stage.name for o in bad)}" if bad else ""
    yield "# {device}, commit {commit}\n\n{date}; torch {torch}, triton {triton}; ".format(**heading) + (
        f"{len(outcomes)} of {planned} stages done{verdict}."
    )
    if heading["device"].startswith(records.SIMULATED):
        yield "A simulated GPU: launches and memory are exact, nothing here is a measured time."
    yield "\n| stage | outcome | seconds | allowed |\n| --- | --- | --- | --- |"
    for o in outcomes:
        yield f"| {o.stage.name} | {o.status}{f' ({o.stage.why})' if o.stage.why else ''} | {o.seconds:.0f} | {o.limit:.0f} |"
    steps = [r for o in outcomes if o.stage.group in ("step", "finetune") for r in o.found]
    if steps:
        yield "\n## One step\n\n| model | step | ms | images/s | MFU | bound ms | bound / measured | launches | peak GiB |"
        yield "|" + " --- |" * 9
        yield from map(step_row, steps)
    for o in outcomes:
        if o in bad:
            yield from (f"\n## {o.stage.name}: {o.status}\n\n```", *o.tail, "```")
        elif o.stage.group in ("kernels", "train", "profile"):
            told = train_lines(o.found[-1]) if o.stage.group == "train" and o.found else o.tail
            # without progress bars and the profiler's own lines
            told = [line for line in told if "%|" not in line and not line.startswith("USDT:")]
            yield from (f"\n## {o.stage.name}\n\n```", *told, "```")


def step_row(record: dict) -> str:
    measured, totals, config = record["measured"], record["totals"], record["config"]
    attack = f", PGD-{config['steps']}" if record["task"] == FINETUNE else ""
    ms, rate, mfu, share = ("-",) * 4
    if measured:
        ms, rate = f"{measured['ms']:.1f}", f"{measured['images_per_s']:.0f}"
        mfu, share = f"{measured['mfu']:.3f}", f"{measured['share_of_bound']:.3f}"
    cells = (config["model"], record["variant"] + attack, ms, rate, mfu, f"{totals['bound_ms']:.1f}", share)
    return f"| {' | '.join(cells)} | {totals['launches']} | {totals['peak_gib']:.1f} |"
