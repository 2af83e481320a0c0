"""Times of several contenders for the same work: interleaved, on rotating inputs, with what the device reaches at best."""

import itertools
import os
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Protocol

import torch

from bench.stage_times import percentiles

Contender = Callable[[int], object]  # does the work on the set of inputs of that number
FEWEST, MOST = 5, 100  # rounds
LEAST_SETS, MOST_SETS = 2, 256
SLOWEST_CLOCK, LONGEST_SLEEP = 2e9, 5e-3  # Hz; seconds
SECOND_LEVEL, LARGE = "SC_LEVEL2_CACHE_SIZE", 2**22  # bytes, for where the system does not tell
COPIED = {"cuda": 2**30, "cpu": 2**27}  # bytes
SIDE = {"cuda": 8192, "cpu": 1024}  # of the square matrices
PRODUCTS = {"bf16": torch.bfloat16, "fp16": torch.float16, "tf32": torch.float32, "fp32": torch.float32}


class Clock(Protocol):
    """Milliseconds of each call, run one after another."""

    def times(self, calls: list[Callable[[], object]]) -> list[float]: ...


class WallClock:
    """For CPUs."""

    def times(self, calls: list[Callable[[], object]]) -> list[float]:
        marks = [time.perf_counter()]
        for call in calls:
            call()
            marks.append(time.perf_counter())
        return [(end - start) * 1e3 for start, end in itertools.pairwise(marks)]


class CudaClock:
    """CUDA events around each call.  The device sleeps while the host enqueues, so that short kernels do not wait for it."""

    def __init__(self):
        self.ahead = 0.0  # seconds that the host took to enqueue the calls last time

    def times(self, calls: list[Callable[[], object]]) -> list[float]:
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in calls]
        torch.cuda.synchronize()
        torch.cuda._sleep(int(min(1.2 * self.ahead, LONGEST_SLEEP) * SLOWEST_CLOCK))
        began = time.perf_counter()
        for call, (start, end) in zip(calls, events):
            start.record()
            call()
            end.record()
        self.ahead = time.perf_counter() - began
        torch.cuda.synchronize()
        return [start.elapsed_time(end) for start, end in events]


def interleaved(contenders: dict[str, Contender], sets: int, rounds: int, clock: Clock) -> dict[str, list[float]]:
    """Milliseconds of every round, by contender.

    Each round runs all contenders, another one first each time; each call takes the next set of inputs, so that a set comes
    back only after all the others.
    """
    names, number = list(contenders), itertools.count()
    found: dict[str, list[float]] = {name: [] for name in names}
    for round_ in range(rounds):
        first = round_ % len(names)
        order = names[first:] + names[:first]
        calls = [partial(contenders[name], next(number) % sets) for name in order]
        for name, ms in zip(order, clock.times(calls)):
            found[name].append(ms)
    return found


def timed(contenders: dict[str, Contender], sets: int, seconds: float, clock: Clock) -> dict[str, dict[str, float]]:
    """ms (median), ms_p20, ms_p80 and rounds by contender: as many rounds as fit into the seconds, 5 at least, 100 at most."""
    trial = interleaved(contenders, sets, 2, clock)
    once = sum(min(values) for values in trial.values()) / 1e3
    rounds = int(min(max(seconds / max(once, 1e-9), FEWEST), MOST))
    return {name: summary(values) for name, values in interleaved(contenders, sets, rounds, clock).items()}


def summary(values: list[float]) -> dict[str, float]:
    """Median, 20th and 80th percentile, and of how many."""
    cuts = percentiles(values)
    return {"ms": statistics.median(values), "ms_p20": cuts["20"], "ms_p80": cuts["80"], "rounds": len(values)}


def sets_for(bytes_per_call: float, cache: int) -> int:
    """How many sets of inputs make twice the cache: what a call reads has then been evicted since its last use."""
    return int(min(max(-(-2 * cache // max(bytes_per_call, 1)), LEAST_SETS), MOST_SETS))


def cache_bytes(device: torch.device) -> int:
    """Bytes of the second-level cache; 4 MiB where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    known = os.sysconf(SECOND_LEVEL) if SECOND_LEVEL in os.sysconf_names else 0
    return known if known > 0 else LARGE


def reached(device: torch.device, rounds: int = 20) -> dict[str, float]:
    """What a plain copy (read plus written) and plain products of random square matrices reach: median of `rounds`.

    tf32 is what fp32 products become with torch's "high" precision; a CPU has none, and its 16-bit products are left out.
    """
    clock = CudaClock() if device.type == "cuda" else WallClock()
    found = {"copy GB/s": _copy_rate(device, rounds, clock)}
    for name in PRODUCTS if device.type == "cuda" else ("fp32",):
        found[f"{name} TFLOP/s"] = _product_rate(name, device, rounds, clock)
    return found


def _copy_rate(device: torch.device, rounds: int, clock: Clock) -> float:
    source = torch.empty(COPIED[device.type], dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / _median(lambda: target.copy_(source), rounds, clock) / 1e6


def _product_rate(name: str, device: torch.device, rounds: int, clock: Clock) -> float:
    side, before = SIDE[device.type], torch.get_float32_matmul_precision()
    a, b = (torch.randn(side, side, device=device).to(PRODUCTS[name]) for _ in range(2))
    torch.set_float32_matmul_precision("high" if name == "tf32" else "highest")
    try:
        return 2 * side**3 / _median(lambda: a @ b, rounds, clock) / 1e9
    finally:
        torch.set_float32_matmul_precision(before)


def _median(call: Callable[[], object], rounds: int, clock: Clock) -> float:
    call()
    return statistics.median(ms for _ in range(rounds) for ms in clock.times([call]))
