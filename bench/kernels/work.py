"""Bytes and FLOPs that a case cannot avoid: the contracts of the operators that our implementation calls, without data."""

from dataclasses import dataclass

import torch
from torch._subclasses import FakeTensorMode

from bench.kernels.case import Case, leaves, outputs
from bench.step.pricing import Price, Setting, price
from bench.step.trace import Recorder

COUNTED = ("ours", "GEMM", "attention")  # classes of bench.step.pricing: not the views and copies around them
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Work:
    """Bytes moved, and FLOPs by arithmetic (a key of a GPU's peaks)."""

    bytes: float
    flops: dict[str, float]

    def __add__(self, other: "Work") -> "Work":
        names = [*self.flops, *(name for name in other.flops if name not in self.flops)]
        flops = {name: self.flops.get(name, 0.0) + other.flops.get(name, 0.0) for name in names}
        return Work(self.bytes + other.bytes, flops)

    def bound_ms(self, reached: dict[str, float | None]) -> float | None:
        """The least time at measured peaks ("copy GB/s", "bf16 TFLOP/s", ...); None where one that is needed is missing."""
        peaks = [reached.get(f"{name} TFLOP/s") for name in self.flops]
        if reached.get("copy GB/s") is None or None in peaks:
            return None
        compute = sum(count / peak / 1e9 for count, peak in zip(self.flops.values(), peaks))
        return max(compute, self.bytes / reached["copy GB/s"] / 1e6)


def work(case: Case) -> dict[str, Work]:
    """By direction: forward, and with a differentiable input backward and both; empty if ours does not offer the case."""
    if case.refused:
        return {}
    with FakeTensorMode():
        inputs = case.draw(CPU)
        with Recorder(CPU.type) as forward:
            results = outputs(case.ours(**inputs))
        found = {"forward": _sum(forward)}
        if leaves(inputs):
            upstream = [torch.ones_like(result) for result in results]
            with Recorder(CPU.type) as backward:
                torch.autograd.grad(results, list(leaves(inputs).values()), upstream)
            found["backward"] = _sum(backward)
            found["both"] = found["forward"] + found["backward"]
    return found


def _sum(recorder: Recorder) -> Work:
    prices: list[Price] = [p for call in recorder.calls for p in price(call, Setting(tf32=True))]
    total = Work(0.0, {})
    for p in prices:
        if p.kind in COUNTED:
            total += Work(p.bytes, p.flops)
    return total
