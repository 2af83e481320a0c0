"""A table of trials: what each candidate takes, and how close it comes to what this device does at most."""

import statistics
from typing import NamedTuple

import torch

from mimir_fast.config.resolve import DTYPES
from mimir_fast.tuning.measuring import Trial, fastest
from mimir_fast.tuning.records import Problem
from mimir_fast.tuning.timers import Stopwatch

# Side of the matrices and bytes of the copy that show a device's peaks: large enough for a GPU, quick enough for a CPU.
SIDES, BYTES = {"cuda": 8192, "cpu": 1024}, {"cuda": 2**30, "cpu": 2**26}
TIMES = 5


class Peaks(NamedTuple):
    """What a device was measured to do: FLOP/s of a square product, bytes/s read and written by a copy."""

    flops: float
    bandwidth: float


def measured_peaks(stopwatch: Stopwatch, device: torch.device, dtype: str) -> Peaks:
    """The peaks of a device, for products in this dtype."""
    side, size = SIDES[device.type], BYTES[device.type]
    try:
        with stopwatch.context():
            matrix = torch.ones(side, side, dtype=DTYPES[dtype], device=device)
            source = torch.zeros(size, dtype=torch.uint8, device=device)
            result, target = torch.empty_like(matrix), torch.empty_like(source)
            product = stopwatch.ready(lambda: torch.mm(matrix, matrix, out=result))
            copy = stopwatch.ready(lambda: target.copy_(source))
            seconds = [statistics.median(once() for _ in range(TIMES)) for once in (product, copy)]
    finally:
        stopwatch.release()
    return Peaks(2.0 * side**3 / seconds[0], 2.0 * size / seconds[1])


def table(problem: Problem, trials: list[Trial], peaks: Peaks) -> list[str]:
    """Lines: the problem, and for each candidate its time, its rate, the rate's share of the peak, whether it is chosen."""
    taken = fastest(trials)
    wide = max(len(str(trial.candidate)) for trial in trials)
    lines = [f"{problem}, batch {problem.batch}, forward and backward pass:"]
    for trial in trials:
        name = f"  {trial.candidate!s:<{wide}}"
        if trial.seconds is None:
            lines.append(f"{name}  out: {trial.why}")
            continue
        # Products limit an MLP, memory the attention over a short sequence.
        work, unit, peak = (
            (problem.flops / 1e12, "TFLOP/s", peaks.flops / 1e12)
            if problem.op == "mlp"
            else (problem.bytes / 1e9, "GB/s", peaks.bandwidth / 1e9)
        )
        rate = work / trial.seconds
        chosen = "  chosen" if trial.candidate == taken else ""
        lines.append(f"{name}  {trial.seconds * 1e3:9.3f} ms  {rate:8.4g} {unit:<7}  {rate / peak:6.1%}{chosen}")
    return lines
