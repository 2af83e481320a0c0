"""From a step to its roofline: warm up, count one undisturbed step, trace another, price its calls, add them up."""

import os
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path

import torch
from triton.testing import do_bench

from bench import simulated_gpu
from bench.peaks import GAP_SECONDS, Peak
from bench.step.launches import END, HOST, STEP, TRACE, Counts, beyond, from_log, from_profiler, region
from bench.step.prices import CLASSES, Price
from bench.step.trace import record
from bench.steps import Update

WARM_UP = 6  # compile, compile again for what the first step could not know, settle; capture, replay
MEASURED_MS = 2000  # of repeated steps on a real GPU
HOST_STEPS = 30  # whose host time is taken
TOTALS = """kernels + GEMMs + memsets {kernels} + {gemms} + {memsets} = {launches}; syncs {syncs}; copies to host {to_host}
{gb:.1f} GB in all, {gb_outside_gemm_attention:.1f} GB outside GEMM and attention; GEMM {gemm_tflop:.2f} TFLOP; \
peak {peak_gib:.2f} GiB; bound {bound_ms:.1f} ms ({bound_without_solves_ms:.1f} ms without dense solves)"""
EXPECTED = (
    "expected, no bound and no measurement: {ms:.0f} ms, {without_solves_ms:.0f} with the solves hidden; {source}"
)
HOST_LINE = """host {ms:.2f} ms per step (process CPU time, median of {steps}), {share_of_bound:.1%} of the device bound
issued {issued}: kernels {kernels}, products {gemms}, solves {solves}, graphs {graphs}, memsets {memsets}, copies {copies}, \
syncs {syncs}, allocations {allocations}; illegal in a capture {illegal}"""
MEASURED = (
    "measured {ms:.2f} ms, {images_per_s:.0f} images/s, MFU {mfu:.1%}, {share_of_bound:.1%} of the bound's speed, \
device idle {idle:.1%}"
)


@dataclass(frozen=True)
class Step:
    """What was found out about a step; ms and idle (a share of it) are measured, None on a simulated GPU.

    prices, counts, peak_gib   of the uncaptured step
    issued, host_ms            of the step as the training runs it: what the host issues, and its CPU time
    """

    prices: list[Price]
    counts: Counts
    peak_gib: float
    issued: Counts
    host_ms: float
    ms: float | None = None
    idle: float | None = None


def on_gpu(update: Update) -> Step:
    """Prices, the profiler's counts, and the median time of repeated steps as the training runs them."""
    warm_up(update.uncaptured)
    peak_gib, calls = peak_of_memory(update.uncaptured), record(update.uncaptured, "cuda")
    gemms = sum(prices[0].kind == "GEMM" for prices in calls)
    counts, _ = from_profiler(update.uncaptured, gemms)
    warm_up(update.run)
    issued, idle = from_profiler(update.run, 0)
    ms = do_bench(update.run, rep=MEASURED_MS, return_mode="median")
    return Step([*chain(*calls)], counts, peak_gib, issued, host_ms(update.run), ms, idle)


def on_simulated_gpu(update: Update) -> Step:
    """Prices and the log's counts; the log also shows whether a launch escaped the trace.

    Raises ValueError outside of a simulated GPU, RuntimeError if the traced step launched something else.
    """
    mark = simulated_gpu.marker()
    if mark is None:
        raise ValueError("simulated_gpu: this process runs on none")
    warm_up(update.uncaptured)
    mark(STEP)
    peak_gib = peak_of_memory(update.uncaptured)
    mark(END)
    mark(TRACE)
    calls = record(update.uncaptured, "cuda", lambda number: mark(str(number)))
    mark(END)
    warm_up(update.run)
    mark(HOST)
    update.run()
    mark(END)
    with simulated_gpu.host_timed():
        ms = host_ms(update.run)
    log = Path(os.environ[simulated_gpu.LOG])
    traced = region(log, TRACE)
    counts, disturbed = from_log(region(log, STEP)), from_log(traced)
    # not how often torch's pool grew: that depends on when the thread of the backward pass lets go of a tensor
    if replace(counts, allocations=0) != replace(disturbed, allocations=0):
        raise RuntimeError(f"tracing changed the step: {counts} without, {disturbed} with it")
    return Step([*chain(*calls), *beyond(calls, traced)], counts, peak_gib, from_log(region(log, HOST)), ms)


def host_ms(run: Callable[[], object]) -> float:
    """CPU time that this process takes to issue a step, all its threads together: the median of HOST_STEPS."""
    taken = []
    for _ in range(HOST_STEPS):
        torch.cuda.synchronize()
        started = time.process_time()
        run()
        taken.append(time.process_time() - started)
    return statistics.median(taken) * 1e3


def warm_up(step: Callable[[], object]) -> None:
    """Until nothing is compiled or captured any more."""
    for _ in range(WARM_UP):
        step()
    torch.cuda.synchronize()


def peak_of_memory(step: Callable[[], object]) -> float:
    """Peak of the allocator during one step, parameters and images included [GiB]."""
    torch.cuda.reset_peak_memory_stats()
    step()
    return torch.cuda.max_memory_allocated() / 2**30


# ---- the record, and the record as text


def sums(prices: list[Price], peak: Peak | None) -> dict:
    """count, GB, TFLOP of some prices, and their bound in ms (None where no peak is known)."""
    return {
        "count": len(prices),
        "gb": sum(p.bytes for p in prices) / 1e9,
        "tflop": sum(sum(p.flops.values()) for p in prices) / 1e12,
        "bound_ms": sum(p.seconds(peak) for p in prices) * 1e3 if peak else None,
    }


def summary(step: Step, peak: Peak, batch: int) -> dict:
    """A step on a GPU for one line of JSON.

    classes   class of call -> sums; totals: counts and sums of the step; calls: sums by name, most expensive first
    expected  ms with the shares of the peaks that programs reach, all in a row and with the solves beside other work
    host      what the host issues, its ms, and the share of the device bound that these are
    measured  ms, images/s, MFU (GEMM and attention FLOPs over what the bf16 peak could do in that time), bound / ms, idle share
    """
    classes = {kind: sums([p for p in step.prices if p.kind == kind], peak) for kind in CLASSES}
    whole, gemm, attention = sums(step.prices, peak), classes["GEMM"], classes["attention"]
    totals = {
        **step.counts.as_dict(),
        "gb": whole["gb"],
        "gb_outside_gemm_attention": whole["gb"] - gemm["gb"] - attention["gb"],
        "gemm_tflop": gemm["tflop"],
        "peak_gib": step.peak_gib,
        "bound_ms": whole["bound_ms"],
        "bound_without_solves_ms": whole["bound_ms"] - classes["solves"]["bound_ms"],
    }
    expected = sum(p.seconds(peak, peak.reached) for p in step.prices) + GAP_SECONDS * step.counts.as_dict()["launches"]
    hidden = expected * 1e3 - classes["solves"]["bound_ms"]
    expectation = {"ms": expected * 1e3, "without_solves_ms": hidden, "source": peak.reached_source}
    groups: dict[tuple, list[Price]] = {}
    for p in step.prices:
        groups.setdefault((p.kind, p.name, p.why), []).append(p)
    calls = [{"kind": k, "name": name, "why": why, **sums(g, peak)} for (k, name, why), g in groups.items()]
    measured = None
    if step.ms is not None:
        measured = {
            "ms": step.ms,
            "images_per_s": batch / step.ms * 1e3,
            "mfu": (gemm["tflop"] + attention["tflop"]) * 1e12 / (step.ms / 1e3 * peak.flops["bf16"]),
            "share_of_bound": totals["bound_ms"] / step.ms,
            "idle": step.idle,
        }
    host = {"ms": step.host_ms, "steps": HOST_STEPS, "share_of_bound": step.host_ms / totals["bound_ms"]}
    host |= step.issued.as_dict()
    calls.sort(key=lambda row: (-row["bound_ms"], row["name"]))
    found = {"classes": classes, "totals": totals, "expected": expectation, "host": host, "measured": measured}
    return {**found, "calls": calls}


def lines(found: dict) -> Iterator[str]:
    """A summary for people."""
    row = "{:<12}{count:>7}{gb:>10.3f}{tflop:>9.3f}{bound_ms:>10.3f}  {}".format
    yield "{:<12}{:>7}{:>10}{:>9}{:>10}".format("class", "calls", "GB", "TFLOP", "bound ms")
    for kind, part in found["classes"].items():
        yield row(kind, "", **part)
    yield "\ncalls by name: ours by kernels/*/cost.py, Inductor's kernels by its own counts, the rest by input plus output"
    for call in found["calls"]:
        yield row(call["kind"], call["name"], **{name: call[name] for name in ("count", "gb", "tflop", "bound_ms")})
    lacking = [f"{call['name']}: {call['why']}" for call in found["calls"] if call["why"]]
    yield "\n".join(["\nunpriced in part or in whole: " + ("" if lacking else "nothing"), *lacking])
    yield "\n" + TOTALS.format(**found["totals"])
    yield EXPECTED.format(**found["expected"])
    yield HOST_LINE.format(**found["host"])
    if found["measured"]:
        yield MEASURED.format(**found["measured"])
