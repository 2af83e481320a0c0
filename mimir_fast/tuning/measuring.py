"""Measuring one problem: every candidate is compared with the reference, then all are timed in interleaved rounds."""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from mimir_fast.tuning.records import Candidate, Problem

# Of those within this share of the fastest the first in the candidates' order is taken.
TIE = 0.03
# Times of each candidate.
ROUNDS = 21
# Why a candidate is out that was not tried.
TOO_LATE = "not tried: the time is over"


class Bench(Protocol):
    """One problem on one device, ready to be computed by candidates."""

    def wrong(self, candidate: Candidate) -> str:
        """Compute it once; says what is wrong with the values, "" if nothing is."""
        ...

    def timed(self, candidate: Candidate) -> Callable[[], float]:
        """Warm up; returns a function that computes it once and returns the seconds that this took."""
        ...


@dataclass(frozen=True)
class Trial:
    """What became of a candidate: seconds of both passes, None where it is out; why it is out."""

    candidate: Candidate
    seconds: float | None
    why: str = ""


class NothingWorksError(RuntimeError):
    """No candidate computes the problem."""


def measure(
    problem: Problem,
    candidates: Sequence[Candidate],
    bench: Bench,
    say: Callable[[str], None],
    ends: float = float("inf"),
    clock: Callable[[], float] = time.monotonic,
    rounds: int = ROUNDS,
) -> list[Trial]:
    """A trial of every candidate, in their order; lines about those that are out.

    ends   time of the clock after which no further candidate is tried, but the first always is
    Raises NothingWorksError where all are out.
    """
    ready: dict[Candidate, Callable[[], float]] = {}
    out: dict[Candidate, str] = {}
    for candidate in candidates:
        if ready and clock() > ends:
            out[candidate] = TOO_LATE
            continue
        why = _prepared(candidate, bench, ready)
        if why:
            out[candidate] = why
            say(f"tune: {problem}: {candidate} is out: {why}")
    if not ready:
        reasons = "; ".join(f"{candidate}: {why}" for candidate, why in out.items())
        raise NothingWorksError(
            f"tune: no implementation of {problem} works here ({reasons}); --tune off takes the defaults"
        )
    seconds: dict[Candidate, list[float]] = {candidate: [] for candidate in ready}
    # In turns: what slows the machine down for a while slows all of them.
    for _ in range(rounds):
        for candidate, once in ready.items():
            seconds[candidate].append(once())
    return [
        Trial(c, statistics.median(seconds[c]) if c in seconds else None, out.get(c, "")) for c in candidates
    ]  # fmt: skip


def _prepared(candidate: Candidate, bench: Bench, ready: dict) -> str:
    """Why a candidate is out, or "", and then it is among those that are ready."""
    try:
        if why := bench.wrong(candidate):
            return f"WRONG VALUES: {why}"
        ready[candidate] = bench.timed(candidate)
    except torch.OutOfMemoryError:
        return "out of memory"
    # Whatever a package, a compiler or a driver raises: the others are there.
    except Exception as error:
        return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
    return ""


def fastest(trials: Sequence[Trial]) -> Candidate:
    """The candidate to take: the first of those within TIE of the fastest."""
    times = [trial.seconds for trial in trials if trial.seconds is not None]
    best = min(times)
    return next(t.candidate for t in trials if t.seconds is not None and t.seconds <= best * (1 + TIE))


def worst_part(found: dict[str, Tensor], eager: dict[str, Tensor], truth: dict[str, Tensor], judge: Callable) -> str:
    """What the judge says of the first tensor that is wrong, by its name; "" if none is."""
    for name, expected in truth.items():
        if complaint := judge(found[name], eager[name], expected):
            return f"{name}: {complaint}"
    return ""
