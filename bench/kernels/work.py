"""Bytes and FLOPs that a case cannot avoid: the contracts of the operators that our implementation calls, without data."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch._subclasses import FakeTensorMode

from bench.kernels.case import Case, leaves, outputs
from bench.step.prices import price
from bench.step.trace import record

COUNTED = ("ours", "GEMM", "attention")  # classes of bench/step/prices.py: not the views and copies around them


@dataclass(frozen=True)
class Work:
    """Bytes moved, and FLOPs by arithmetic (a key of a GPU's peaks)."""

    bytes: float
    flops: dict[str, float]

    def bound_ms(self, reached: dict[str, float]) -> float | None:
        """The least time at measured peaks ("copy GB/s", "bf16 TFLOP/s", ...); None where one that is needed is missing."""
        peaks = [reached.get(f"{name} TFLOP/s") for name in self.flops]
        if "copy GB/s" not in reached or None in peaks:
            return None
        compute = sum(count / peak / 1e9 for count, peak in zip(self.flops.values(), peaks))
        return max(compute, self.bytes / reached["copy GB/s"] / 1e6)


def work(case: Case) -> dict[str, Work]:
    """By direction: forward, and with a differentiable input backward and both; empty if ours does not offer the case."""
    if case.refused:
        return {}
    with FakeTensorMode():
        inputs, results = case.draw(torch.device("cpu")), []
        found = {"forward": _counted(lambda: results.extend(outputs(case.ours(**inputs))))}
        if leaves(inputs):
            upstream = [torch.ones_like(result) for result in results]
            found["backward"] = _counted(lambda: torch.autograd.grad(results, list(leaves(inputs).values()), upstream))
            found["both"] = _sum(*found.values())
    return found


def _counted(call: Callable[[], object]) -> Work:
    prices = [p for called in record(call, "cpu") for p in price(called, tf32=True)]
    return _sum(*(Work(p.bytes, p.flops) for p in prices if p.kind in COUNTED))


def _sum(*parts: Work) -> Work:
    names = dict.fromkeys(name for part in parts for name in part.flops)
    flops = {name: sum(part.flops.get(name, 0.0) for part in parts) for name in names}
    return Work(sum(part.bytes for part in parts), flops)
