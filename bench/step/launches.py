"""What the host issues in a step: from the log of a simulated GPU, or from torch's profiler on a real one."""

import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from bench.step.prices import Price

STEP, TRACE, HOST, END, PRODUCT = "step", "trace", "host", "end", "product"  # marks in the log
OUTSIDE = -1
LAUNCHES = ("KERNEL", "TRITON", "GEMM", "SOLVER")
# count -> the CUDA calls that it counts
CALLS = {
    "kernels": r"cu(da)?LaunchKernel",
    "memsets": r"cu(da)?Memset",
    "graphs": r"cu(da)?GraphLaunch",
    "copies": r"cu(da)?Memcpy",
    "syncs": r"cu(da)?\w*Synchronize",
    "allocations": r"cu(da)?(Malloc|MemAlloc|HostAlloc)",
}


@dataclass(frozen=True)
class Counts:
    """One step's kernels (matrix products apart), products, memsets, dense solves, launches of CUDA graphs, copies and those of
    them to the host, synchronisations, allocations outside of torch's pool, calls that are illegal in a capture."""

    kernels: int
    gemms: int
    memsets: int
    solves: int = 0
    graphs: int = 0
    copies: int = 0
    to_host: int = 0
    syncs: int = 0
    allocations: int = 0
    illegal: int = 0

    def as_dict(self) -> dict[str, int]:
        launches = self.kernels + self.gemms + self.memsets
        issued = launches + self.solves + self.graphs + self.copies + self.syncs + self.allocations
        return {**asdict(self), "launches": launches, "issued": issued}


def region(log: Path, start: str) -> list[list[str]]:
    """The log's lines after the last mark `start` up to the mark `end` after it, each split at |."""
    rows = [line.split("|") for line in log.read_text(errors="replace").splitlines()]
    first = len(rows) - rows[::-1].index(["MARK", start])
    return rows[first : rows.index(["MARK", END], first)]


def from_log(rows: list[list[str]]) -> Counts:
    """Counts of a region of the log."""
    kinds = Counter(row[0] for row in rows)
    graphs = Counter(row[1] for row in rows if row[0] == "GRAPH")
    copied = Counter(row[1] for row in rows if row[0] == "MEMCPY")
    return Counts(
        kernels=kinds["KERNEL"] + kinds["TRITON"],
        gemms=kinds["GEMM"] + rows.count(["MARK", PRODUCT]),
        memsets=kinds["MEMSET"],
        solves=kinds["SOLVER"],
        graphs=graphs["launch"],
        copies=kinds["MEMCPY"] + kinds["MEMCPY2D"],
        to_host=copied["D2H"],
        syncs=kinds["SYNC"],
        allocations=kinds["MALLOC"],
        illegal=graphs["illegal"] + graphs["outside"],
    )


def beyond(calls: list[list[Price]], rows: list[list[str]]) -> Iterator[Price]:
    """Prices of what the log knows beyond the calls: memsets inside of them, copies and launches outside of every call.

    rows   of a region with marks, the number of the call before it and -1 after it
    """
    number = OUTSIDE
    for kind, *rest in rows:
        if kind == "MARK" and rest[0] != PRODUCT:
            number = int(rest[0])
        elif kind == "MEMSET" and (number == OUTSIDE or calls[number][0].kind != "copies"):
            yield Price("copies", "memset", int(rest[0]))
        elif kind in ("MEMCPY", "MEMCPY2D") and number == OUTSIDE:
            yield Price("copies", f"memcpy {rest[0]}", (1 + (rest[0] == "D2D")) * int(rest[-1]))
        elif kind in LAUNCHES and number == OUTSIDE:
            yield Price("other ATen", rest[0], 0, why="launched outside of every recorded call, bytes unknown")


def from_profiler(step: Callable[[], object], gemms: int) -> tuple[Counts, float]:
    """Counts of one step on a real GPU, and the share of the step in which it was idle.

    gemms   how many of its kernels are matrix products (known from the trace)
    """
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=activities) as profile:
        with torch.profiler.record_function(STEP):
            step()
        torch.cuda.synchronize()
    return counts_of(profile.events(), gemms)


def counts_of(events: list, gemms: int) -> tuple[Counts, float]:
    """Counts and idle share from a profile's events, of which one on the host is called STEP."""
    on_device = [e for e in events if e.device_type == torch.autograd.DeviceType.CUDA and not e.is_user_annotation]
    on_host = [e for e in events if e.device_type == torch.autograd.DeviceType.CPU]
    (span,) = (e.time_range for e in on_host if e.name == STEP)
    called = [e.name for e in on_host if span.start <= e.time_range.start <= span.end]
    counts = {name: sum(bool(re.match(calls, c)) for c in called) for name, calls in CALLS.items()}
    to_host = sum(e.name.startswith("Memcpy DtoH") for e in on_device)
    busy, reached = 0.0, span.start
    for e in sorted(on_device, key=lambda e: e.time_range.start):
        busy += max(e.time_range.end - max(e.time_range.start, reached), 0)
        reached = max(reached, e.time_range.end)
    counted = Counts(**counts | {"kernels": counts["kernels"] - gemms}, gemms=gemms, to_host=to_host)
    return counted, 1 - busy / max(reached - span.start, 1e-9)
