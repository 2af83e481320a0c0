"""What a case cannot avoid, by the costs of the operators that our implementation calls: bytes, FLOPs, the least time."""

from collections.abc import Callable
from itertools import chain

import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

from bench.kernels.case import Case, leaves, outputs
from bench.peaks import Peak
from bench.step.prices import Price
from bench.step.trace import record

COUNTED = ("ours", "GEMM", "attention")  # classes of bench/step/prices.py: not the views and copies around them


def work(case: Case) -> dict[str, list[Price]]:
    """By direction: forward, and with a differentiable input backward and both; empty if ours does not offer the case."""
    if case.refused:
        return {}
    with FakeTensorMode():
        inputs = case.draw(torch.device("cpu"))
        results: list[Tensor] = []
        found = {"forward": _counted(lambda: results.extend(outputs(case.ours(**inputs))))}
        if leaves(inputs):
            upstream = [torch.ones_like(result) for result in results]
            found["backward"] = _counted(lambda: torch.autograd.grad(results, list(leaves(inputs).values()), upstream))
            found["both"] = found["forward"] + found["backward"]
    return found


def _counted(call: Callable[[], object]) -> list[Price]:
    return [p for p in chain(*record(call, "cpu")) if p.kind in COUNTED]


def figures(prices: list[Price], peak: Peak | None) -> dict[str, float | None]:
    """GB, TFLOP and, where the GPU's peaks are known, the bound in ms."""
    bound = sum(p.seconds(peak) for p in prices) * 1e3 if peak else None
    flops = sum(sum(p.flops.values()) for p in prices)
    return {"GB": sum(p.bytes for p in prices) / 1e9, "TFLOP": flops / 1e12, "bound ms": bound}
