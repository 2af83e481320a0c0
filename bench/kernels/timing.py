"""How long a call takes, and what a device reaches at best.  Medians with their 20th and 80th percentiles, in milliseconds."""

import statistics
from collections.abc import Callable

import torch
from torch.utils.benchmark import Timer
from triton.testing import do_bench

from bench.stage_times import percentiles

ROUNDS = 20
COPIED = {"cuda": 2**30, "cpu": 2**27}  # bytes
SIDE = {"cuda": 8192, "cpu": 1024}  # of the square matrices
PRODUCTS = {"bf16": torch.bfloat16, "fp16": torch.float16, "tf32": torch.float32, "fp32": torch.float32}


def timed(call: Callable[[], object], benchmark, device: torch.device) -> dict[str, float]:
    """ms, ms_p20, ms_p80, rounds: on a GPU the device's time, its cache emptied in between; elsewhere pytest-benchmark's.

    call ms: pytest-benchmark's, the host and on a GPU the wait for the device included.
    """

    def waited() -> None:
        call()
        if device.type == "cuda":
            torch.cuda.synchronize()

    benchmark.pedantic(waited, rounds=ROUNDS, warmup_rounds=2)
    seconds = benchmark.stats.stats.data
    ms, cuts = statistics.median(seconds) * 1e3, percentiles(seconds)
    if device.type == "cpu":
        return {"ms": ms, "ms_p20": cuts["20"] * 1e3, "ms_p80": cuts["80"] * 1e3, "rounds": len(seconds), "call ms": ms}
    found = dict(zip(("ms", "ms_p20", "ms_p80"), do_bench(call, quantiles=(0.5, 0.2, 0.8))))
    return {**found, "rounds": None, "call ms": ms}


def reached(device: torch.device) -> dict[str, float]:
    """What a plain copy (read plus written) and plain products of random square matrices reach.

    tf32 is what fp32 products become with torch's "high" precision; a CPU has none, and its 16-bit products are left out.
    """
    source = torch.empty(COPIED[device.type], dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    found = {"copy GB/s": 2 * source.nbytes / _median(lambda: target.copy_(source), device) / 1e6}
    before, side = torch.get_float32_matmul_precision(), SIDE[device.type]
    for name in PRODUCTS if device.type == "cuda" else ("fp32",):
        a, b = (torch.randn(side, side, device=device).to(PRODUCTS[name]) for _ in range(2))
        torch.set_float32_matmul_precision("high" if name == "tf32" else "highest")
        try:
            found[f"{name} TFLOP/s"] = 2 * side**3 / _median(lambda a=a, b=b: a @ b, device) / 1e9
        finally:
            torch.set_float32_matmul_precision(before)
    return found


def _median(call: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        return do_bench(call, return_mode="median")
    timer = Timer("call()", globals={"call": call}, num_threads=torch.get_num_threads())
    return timer.blocked_autorange(min_run_time=0.1).median * 1e3
