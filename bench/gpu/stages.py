"""Stages one after another, each a process of its own: one that fails or takes too long does not stop the others."""

import contextlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from bench.gpu.plan import Stage
from bench.records import ROOT

MARGIN = 0.8  # of the limit is what a command is told: its processes have to start
GRACE = 5.0  # seconds between asking a process to end and ending it
TAIL = 40  # lines of a log that are kept


@dataclass(frozen=True)
class Outcome:
    """How a stage went: ok, failed, over time or skipped; seconds taken and allowed; its log, records and last lines."""

    stage: Stage
    status: str
    seconds: float = 0.0
    limit: float = 0.0
    log: Path | None = None
    records: list[dict] = field(default_factory=list)
    tail: list[str] = field(default_factory=list)


def run_all(
    stages: list[Stage], seconds: float, output: Path, report: Callable[[list[Outcome]], None]
) -> list[Outcome]:
    """Run the stages within `seconds` in all; report(outcomes so far) after each.

    A stage may take its share of what is left, so that what one leaves over goes to those after it.
    """
    ends = time.monotonic() + seconds
    outcomes: list[Outcome] = []
    for number, stage in enumerate(stages, 1):
        left = max(ends - time.monotonic(), 0.0)
        limit = left * stage.share / sum(later.share for later in stages[number - 1 :])
        print(f"[{number}/{len(stages)}] {stage.name}: at most {limit:.0f} s of {left:.0f} s left", flush=True)
        outcomes.append(run_one(stage, limit, output / f"{number:02d}-{stage.name.replace(' ', '-')}.log"))
        done = outcomes[-1]
        print(f"[{number}/{len(stages)}] {stage.name}: {done.status}, {done.seconds:.0f} s", flush=True)
        report(outcomes)
    return outcomes


def run_one(stage: Stage, limit: float, log: Path) -> Outcome:
    """One stage; whatever it prints goes into the log."""
    if stage.why:
        return Outcome(stage, "skipped", tail=[stage.why])
    before = len(_lines(stage.results))
    started = time.monotonic()
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as out:
        process = subprocess.Popen(
            [*stage.command, *(["--seconds", f"{MARGIN * limit:.0f}"] if stage.told else [])],
            cwd=ROOT,
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
    records = [json.loads(line) for line in _lines(stage.results)[before:]]
    return Outcome(stage, status, time.monotonic() - started, limit, log, records, _lines(log)[-TAIL:])


def _end(process: subprocess.Popen) -> None:
    """End what is left of the process and of everything it started."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(GRACE)


def _lines(file: Path | None) -> list[str]:
    return file.read_text(errors="replace").splitlines() if file and file.exists() else []
