"""How often a step launches, waits and copies: from the log of a simulated GPU, or from torch's profiler on a real one."""

import itertools
import statistics
import subprocess
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

STEP, TRACE, END = "step", "trace", "end"  # marks in the log
OUTSIDE = -1
WORK = ("KERNEL", "TRITON", "GEMM", "SOLVER", "MEMSET", "MEMCPY", "MEMCPY2D")


@dataclass(frozen=True)
class Counts:
    """One step's kernels (matrix products apart), products, memsets, synchronisations and copies to the host."""

    kernels: int
    gemms: int
    memsets: int
    syncs: int
    to_host: int

    def as_dict(self) -> dict[str, int]:
        return {**asdict(self), "launches": self.kernels + self.gemms + self.memsets}


def region(log: Path, start: str) -> list[list[str]]:
    """The log's lines after the last mark `start` up to the mark `end` after it, each split at |."""
    rows = [line.split("|") for line in log.read_text(errors="replace").splitlines()]
    first = len(rows) - rows[::-1].index(["MARK", start])
    return rows[first : rows.index(["MARK", END], first)]


def from_log(log: Path) -> Counts:
    """Counts of the undisturbed step.

    Raises RuntimeError if a CUDA graph hides its launches, or if the traced step launched something else.
    """
    counted, traced = (_counts(region(log, mark)) for mark in (STEP, TRACE))
    if counted != traced:
        raise RuntimeError(f"tracing changed the step: {counted} without, {traced} with it")
    return counted


def _counts(rows: list[list[str]]) -> Counts:
    kinds = Counter(row[0] for row in rows)
    if kinds["GRAPH"]:
        raise RuntimeError("the step replays a CUDA graph, which hides its launches; trace it without CUDA graphs")
    to_host = sum(row[0] == "MEMCPY" and row[1] == "D2H" for row in rows)
    return Counts(kinds["KERNEL"] + kinds["TRITON"], kinds["GEMM"], kinds["MEMSET"], kinds["SYNC"], to_host)


def launches_by_call(log: Path) -> dict[int, list[list[str]]]:
    """Number of the call -> the log's lines during it; number -1: what was launched outside of every call."""
    found: dict[int, list[list[str]]] = {}
    number = OUTSIDE
    for row in region(log, TRACE):
        if row[0] == "MARK":
            number = int(row[1])
        elif row[0] in WORK:
            found.setdefault(number, []).append(row)
    return found


def plain_name(symbol: str) -> str:
    """A C++ symbol as a person writes it, without arguments; the symbol itself where c++filt is missing."""
    try:
        done = subprocess.run(["c++filt", symbol], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return symbol
    return done.stdout.strip().split("(")[0].split("<")[0].removeprefix("void ")


def from_profiler(step: Callable[[], object], gemms: int) -> Counts:
    """Counts of one step on a real GPU; `gemms`: how many of its kernels are matrix products (known from the trace)."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=activities) as profile:
        step()
        torch.cuda.synchronize()
    on_device = [e for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    names = [e.name for e in on_device if not e.is_user_annotation]
    memsets = sum(name.startswith("Memset") for name in names)
    copies = sum(name.startswith("Memcpy") for name in names)
    to_host = sum(name.startswith("Memcpy DtoH") for name in names)
    return Counts(len(names) - memsets - copies - gemms, gemms, memsets, synchronisations(step), to_host)


def synchronisations(step: Callable[[], object]) -> int:
    """How often torch makes the host wait for the device during a step."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("synchronizing CUDA operation" in str(w.message) for w in caught)


def measure(step: Callable[[], object], rounds: int) -> float:
    """Median milliseconds of a step between CUDA events; the host is not waited for in between."""
    events = [torch.cuda.Event(enable_timing=True) for _ in range(rounds + 1)]
    events[0].record()
    for event in events[1:]:
        step()
        event.record()
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in itertools.pairwise(events))
