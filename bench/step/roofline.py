"""From a variant to its priced step: warm up, count one undisturbed step, trace another, price its calls."""

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from bench.peaks import Peak
from bench.step import counts
from bench.step.pricing import CONVOLUTIONS, Price, Setting, convolution_products, price
from bench.step.table import Roofline
from bench.step.trace import Call, record, source_nodes
from bench.step.variants import ConvolutionStandIn, StepConfig, build_step

WARM_UP = 3  # compile, compile again for what the first step could not know, settle
CUDA = torch.device("cuda")


def roofline_on_gpu(variant: str, config: StepConfig, peak: Peak, rounds: int) -> Roofline:
    """Prices, the profiler's counts, and the median time of `rounds` steps."""
    step = _warm(variant, config)
    peak_gib = _peak_gib(step)
    calls = record(step, CUDA.type)
    priced = price_all(calls)
    gemms = sum(prices[0].kind == "GEMM" for prices in priced)
    counted, ms = counts.from_profiler(step, gemms), counts.measure(step, rounds)
    batch = config.optim.batch_size
    return Roofline(_flat(priced), peak, counted, peak_gib, batch, nodes=source_nodes(), ms=ms)


def roofline_on_pretend_gpu(
    variant: str, config: StepConfig, peak: Peak, mark: Callable[[str], None], log: Path
) -> Roofline:
    """Prices and the log's counts; the log also shows whether a launch escaped the trace.  cuDNN is not there."""
    torch.backends.cuda.enable_cudnn_sdp(False)
    if variant == "textbook":
        with ConvolutionStandIn():
            calls, peak_gib = _marked_steps(variant, config, mark)
    else:
        calls, peak_gib = _marked_steps(variant, config, mark)
    priced = price_all(calls)
    extra, outside = from_launches(priced, counts.launches_by_call(log))
    counted = counts.from_log(log)
    counted = replace(counted, gemms=counted.gemms + convolutions(calls))
    batch = config.optim.batch_size
    return Roofline(_flat(priced) + extra, peak, counted, peak_gib, batch, outside, source_nodes())


def _marked_steps(variant: str, config: StepConfig, mark: Callable[[str], None]) -> tuple[list[Call], float]:
    step = _warm(variant, config)
    mark(counts.STEP)
    peak_gib = _peak_gib(step)
    mark(counts.END)
    mark(counts.TRACE)
    calls = record(step, CUDA.type, lambda number: mark(str(number)))
    mark(counts.END)
    return calls, peak_gib


def _warm(variant: str, config: StepConfig) -> Callable[[], None]:
    torch._inductor.config.benchmark_kernel = True  # every generated kernel then carries its byte count
    step = build_step(variant, config, CUDA)
    for _ in range(WARM_UP):
        step()
    torch.cuda.synchronize()
    return step


def _peak_gib(step: Callable[[], None]) -> float:
    """Peak of the allocator during one step, parameters and images included."""
    torch.cuda.reset_peak_memory_stats()
    step()
    return torch.cuda.max_memory_allocated() / 2**30


def price_all(calls: list[Call]) -> list[list[Price]]:
    """The prices of every call, call by call."""
    setting = Setting(tf32=torch.get_float32_matmul_precision() != "highest")
    return [price(call, setting) for call in calls]


def convolutions(calls: list[Call]) -> int:
    """How many products the log of a pretend GPU without cuDNN misses."""
    return sum(convolution_products(call) for call in calls if call.op in CONVOLUTIONS)


def from_launches(
    priced: list[list[Price]], launches: dict[int, list[list[str]]]
) -> tuple[list[Price], dict[str, int]]:
    """What the log knows beyond the calls: memsets inside of them, copies and launches outside of every call.

    Returns prices by bytes for the memsets and copies, and {name: count} of launches without a price.
    """
    prices, outside = [], Counter()
    for number, rows in launches.items():
        known = number != counts.OUTSIDE
        for row in rows:
            if row[0] == "MEMSET" and not (known and priced[number][0].kind == "copies"):
                prices.append(Price("copies", "memset", int(row[1])))
            elif row[0].startswith("MEMCPY") and not known:
                ends = 2 if row[1] == "D2D" else 1
                prices.append(Price("copies", f"memcpy {row[1]}", ends * int(row[-1])))
            elif row[0] != "MEMSET" and not row[0].startswith("MEMCPY") and not known:
                outside[counts.plain_name(row[1])] += 1
    return prices, dict(outside)


def _flat(priced: list[list[Price]]) -> list[Price]:
    return [price for prices in priced for price in prices]
