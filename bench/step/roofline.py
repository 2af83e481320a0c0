"""From a step to its roofline: warm up, count one undisturbed step, trace another, price its calls, add them up."""

import os
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from bench import simulated_gpu
from bench.peaks import Peak
from bench.step import launches
from bench.step.prices import CLASSES, Price, price
from bench.step.trace import Call, record, source_nodes

WARM_UP = 3  # compile, compile again for what the first step could not know, settle
TOP = 15
OURS = "mimir_fast."
GIGA, TERA = 1e9, 1e12


@dataclass(frozen=True)
class Roofline:
    """A step's prices on one GPU, with what was counted and, on a real GPU, measured.

    outside   kernel name -> launches that belong to no recorded call and have no price
    nodes     file of an Inductor kernel -> the operations it was made from
    ms        median measured milliseconds, None on a simulated GPU
    """

    prices: list[Price]
    peak: Peak
    counts: launches.Counts
    peak_gib: float
    batch: int
    outside: dict[str, int] = field(default_factory=dict)
    nodes: dict[str, str] = field(default_factory=dict)
    ms: float | None = None

    def sum(self, prices: list[Price]) -> dict[str, float]:
        """count, GB, TFLOP and bound in ms of some prices."""
        return {
            "count": len(prices),
            "gb": sum(p.bytes for p in prices) / GIGA,
            "tflop": sum(sum(p.flops.values()) for p in prices) / TERA,
            "bound_ms": sum(p.seconds(self.peak) for p in prices) * 1e3,
        }

    def grouped(self, key: Callable[[Price], str], *kinds: str) -> list[dict]:
        """Prices of some classes (of all, if none is named) added up by a key, most expensive first."""
        groups: dict[str, list[Price]] = {}
        for p in self.prices:
            if p.kind in (kinds or CLASSES):
                groups.setdefault(key(p), []).append(p)
        rows = [{"name": g[0].name, **self.sum(g), "nodes": self.nodes.get(g[0].file, "")} for g in groups.values()]
        return sorted(rows, key=lambda row: -row["bound_ms"])

    def totals(self, classes: dict[str, dict[str, float]]) -> dict[str, float]:
        """Counts of the step, GB of all and outside GEMM and attention, GEMM TFLOP, peak GiB, bound with and without solves."""
        whole = self.sum(self.prices)
        return {
            **self.counts.as_dict(),
            "gb": whole["gb"],
            "gb_outside_gemm_attention": whole["gb"] - classes["GEMM"]["gb"] - classes["attention"]["gb"],
            "gemm_tflop": classes["GEMM"]["tflop"],
            "peak_gib": self.peak_gib,
            "bound_ms": whole["bound_ms"],
            "bound_without_solves_ms": whole["bound_ms"] - classes["solves"]["bound_ms"],
        }

    def measured(self, classes: dict[str, dict[str, float]], bound_ms: float) -> dict[str, float] | None:
        """ms, images/s, MFU (GEMM and attention FLOPs over what the bf16 peak could do in that time), bound / ms."""
        if self.ms is None:
            return None
        flops = (classes["GEMM"]["tflop"] + classes["attention"]["tflop"]) * TERA
        mfu = flops / (self.ms / 1e3 * self.peak.flops["bf16"])
        rate = self.batch / self.ms * 1e3
        return {"ms": self.ms, "images_per_s": rate, "mfu": mfu, "share_of_bound": bound_ms / self.ms}

    def unpriced(self) -> list[dict]:
        """Calls that lack a part of their price, and launches that belong to no call."""
        lacking: dict[tuple[str, str], list[Price]] = {}
        for p in self.prices:
            if p.why:
                lacking.setdefault((p.name, p.why), []).append(p)
        rows = [{"name": n, "why": why, "count": len(g), "gb": self.sum(g)["gb"]} for (n, why), g in lacking.items()]
        outside = "launched outside of every recorded call, bytes unknown"
        return rows + [{"name": n, "why": outside, "count": c, "gb": 0.0} for n, c in self.outside.items()]

    def record(self) -> dict:
        """Everything the table shows, for one line of JSON."""
        classes = {kind: self.sum([p for p in self.prices if p.kind == kind]) for kind in CLASSES}
        totals = self.totals(classes)
        ours = [p for p in self.prices if p.name.startswith(OURS) and p.kind != "solves"]
        names = dict.fromkeys(p.name for p in ours)
        return {
            "classes": classes,
            "totals": totals,
            "measured": self.measured(classes, totals["bound_ms"]),
            "unpriced": self.unpriced(),
            "remainder": [
                {k: row[k] for k in ("name", "count", "gb")} for row in self.grouped(lambda p: p.name, "other ATen")
            ],
            "ours": {
                name.removeprefix(OURS).removesuffix(".default"): self.sum([p for p in ours if p.name == name])
                for name in names
            },
            "top": self.grouped(lambda p: p.file, "Inductor")[:TOP],
        }


def on_gpu(step: Callable[[], object], peak: Peak, batch: int, rounds: int) -> Roofline:
    """Prices, the profiler's counts, and the median time of `rounds` steps."""
    peak_gib = warmed_up(step)
    priced = price_all(record(step, "cuda"))
    gemms = sum(prices[0].kind == "GEMM" for prices in priced)
    counted, ms = launches.from_profiler(step, gemms), launches.measure(step, rounds)
    return Roofline(_flat(priced), peak, counted, peak_gib, batch, nodes=source_nodes(), ms=ms)


def on_simulated_gpu(step: Callable[[], object], peak: Peak, batch: int) -> Roofline:
    """Prices and the log's counts; the log also shows whether a launch escaped the trace.

    Raises ValueError outside of a simulated GPU.
    """
    mark = simulated_gpu.marker()
    if mark is None:
        raise ValueError("simulated_gpu: this process runs on none")
    warmed_up(step)
    mark(launches.STEP)
    peak_gib = peak_of_memory(step)
    mark(launches.END)
    mark(launches.TRACE)
    calls = record(step, "cuda", lambda number: mark(str(number)))
    mark(launches.END)
    log, priced = Path(os.environ[simulated_gpu.LOG]), price_all(calls)
    extra, outside = beyond_the_calls(priced, launches.launches_by_call(log))
    counted = launches.from_log(log)
    counted = replace(counted, gemms=counted.gemms + convolutions(calls))
    return Roofline(_flat(priced) + extra, peak, counted, peak_gib, batch, outside, source_nodes())


def warmed_up(step: Callable[[], object]) -> float:
    """Compile and settle; gives the peak of one step [GiB]."""
    for _ in range(WARM_UP):
        step()
    torch.cuda.synchronize()
    return peak_of_memory(step)


def peak_of_memory(step: Callable[[], object]) -> float:
    """Peak of the allocator during one step, parameters and images included [GiB]."""
    torch.cuda.reset_peak_memory_stats()
    step()
    return torch.cuda.max_memory_allocated() / 2**30


def price_all(calls: list[Call]) -> list[list[Price]]:
    """The prices of every call, call by call."""
    tf32 = torch.get_float32_matmul_precision() != "highest"
    return [price(call, tf32) for call in calls]


def convolutions(calls: list[Call]) -> int:
    """How many products the log of a simulated GPU without cuDNN misses: backward one for each wanted gradient."""
    count = sum(call.op == "convolution" for call in calls)
    for call in calls:
        if call.op == "convolution_backward":
            wanted = [call.read("input").shape, call.read("weight").shape]
            count += sum(spec.shape in wanted for spec in call.writes)
    return count


def beyond_the_calls(
    priced: list[list[Price]], found: dict[int, list[list[str]]]
) -> tuple[list[Price], dict[str, int]]:
    """What the log knows beyond the calls: memsets inside of them, copies and launches outside of every call.

    Returns prices by bytes for the memsets and copies, and {name: count} of launches without a price.
    """
    prices: list[Price] = []
    outside: Counter[str] = Counter()
    for number, rows in found.items():
        known = number != launches.OUTSIDE
        for row in rows:
            if row[0] == "MEMSET" and not (known and priced[number][0].kind == "copies"):
                prices.append(Price("copies", "memset", int(row[1])))
            elif row[0].startswith("MEMCPY") and not known:
                ends = 2 if row[1] == "D2D" else 1
                prices.append(Price("copies", f"memcpy {row[1]}", ends * int(row[-1])))
            elif row[0] != "MEMSET" and not row[0].startswith("MEMCPY") and not known:
                outside[launches.plain_name(row[1])] += 1
    return prices, dict(outside)


def _flat(priced: list[list[Price]]) -> list[Price]:
    return [price for prices in priced for price in prices]
