"""Every operation against its rivals: held to float64 first, then timed.  `python -m bench kernels` starts it.

What is wrong, or raises, fails its test and is on record; what is not offered is skipped.
"""

import statistics
from collections.abc import Callable, Iterator
from functools import cached_property
from itertools import chain

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from triton.testing import do_bench

from bench import records
from bench.kernels.cases import Entry
from bench.kernels.conftest import DEVICE
from bench.peaks import PEAKS
from bench.simulated_gpu import marker
from bench.step.prices import Price
from bench.step.roofline import sums
from bench.step.trace import record
from tests.support.cases import Drawn, leaves, outputs

COUNTED = ("ours", "GEMM", "attention")  # classes of bench/step/prices.py: not the views and copies around them


class Timed(Drawn):
    """A case's inputs, its implementations, and its work."""

    @cached_property
    def work(self) -> dict[str, list[Price]]:
        """What no implementation can avoid, by the costs of the operators that ours calls; empty if ours refuses the case.

        By direction: forward, and with a differentiable input backward and both.
        """
        if self.case.refused:
            return {}

        def counted(call: Callable[[], object]) -> list[Price]:
            return [p for p in chain(*record(call, "cpu")) if p.kind in COUNTED]

        with FakeTensorMode(), torch.device("cpu"):
            inputs, results = self.case.draw(), list[Tensor]()
            found = {"forward": counted(lambda: results.extend(outputs(self.case.ours(**inputs))))}
            if wanted := list(leaves(inputs).values()):
                upstream = [torch.ones_like(result) for result in results]
                found["backward"] = counted(lambda: torch.autograd.grad(results, wanted, upstream))
                found["both"] = found["forward"] + found["backward"]
        return found

    @cached_property
    def implementations(self) -> dict[str, Callable]:
        case, compiled = self.case, torch.compile(self.case.reference, dynamic=False)
        return {"ours": case.ours, "eager": case.reference, "compiled": compiled, **case.rivals}

    def call(self, name: str, direction: str) -> Callable[[], object]:
        """What is timed.  backward starts from outputs that are kept."""
        function, wanted = self.implementations[name], list(leaves(self.inputs).values())
        if direction == "forward":
            return lambda: function(**self.inputs)
        if direction == "both":
            return lambda: torch.autograd.grad(outputs(function(**self.inputs)), wanted, self.upstream)
        kept = outputs(function(**self.inputs))
        return lambda: torch.autograd.grad(kept, wanted, self.upstream, retain_graph=True)


@pytest.fixture(scope="module")
def timed(request) -> Iterator[Timed]:
    """A case's inputs; nothing compiled for another case counts against this one, buffers of kept graphs are not given away."""
    torch._dynamo.reset()
    with torch._functorch.config.patch(donated_buffer=False):
        yield Timed(request.param.case, DEVICE)


def test_speed(request, timed, name, direction, benchmark):
    case, entry, times = timed.case, request.node.callspec.params["timed"], None

    def note(status: str, why: str = "") -> None:
        if file := request.config.getoption("results"):
            records.append(row(timed, entry, name, direction) | {"status": status, "why": why} | (times or {}), file)

    if direction != "forward" and not leaves(timed.inputs):
        pytest.skip("nothing to differentiate")
    if name == "ours" and case.refused:
        note("refused", case.refused)
        pytest.skip(case.refused)
    benchmark.group = f"{case.label} {direction}"
    try:
        wrong = "" if marker() else timed.wrong(name, timed.values(timed.implementations[name]))
        times = None if wrong else measured(timed.call(name, direction), benchmark)
    except Exception as error:
        note("failed", " ".join(f"{type(error).__name__}: {error}".split())[:200])
        raise
    note("wrong" if wrong else "simulated" if marker() else "ok", wrong)
    assert not wrong


def row(timed: Timed, entry: Entry, name: str, direction: str) -> dict:
    """The measurement's record, without what was measured: the first recipe with the part of the model, and all recipes."""
    case, device = timed.case, records.device_name(DEVICE)
    what = {"op": case.op, "config": case.shape, "dtype": case.dtype, "direction": direction, "impl": name}
    recipes = {"recipe": f"{entry.recipes[0]} {case.part}".strip(), "recipes": entry.recipes}
    found = {**records.heading(device), "kind": "kernels", **recipes, **what, "status": "", "why": ""}
    found |= dict.fromkeys(("ms", "ms_p20", "ms_p80", "call ms"))
    if known := timed.work.get(direction):
        gpu = records.peaks_of(device)
        work = sums(known, PEAKS[gpu] if gpu else None)
        found |= {"GB": work["gb"], "TFLOP": work["tflop"], "bound ms": work["bound_ms"]}
    return found


def measured(call: Callable[[], object], benchmark) -> dict[str, float] | None:
    """ms, ms_p20, ms_p80: on a GPU the device's time, its cache emptied in between; elsewhere pytest-benchmark's.

    call ms: pytest-benchmark's, the host and on a GPU the wait for the device included.  A simulated GPU has no times.
    """
    if marker():
        benchmark(call)
        return None
    wait = torch.cuda.synchronize if DEVICE.type == "cuda" else lambda: None
    benchmark.pedantic(lambda: (call(), wait()), rounds=20, warmup_rounds=2)
    ms = [seconds * 1e3 for seconds in benchmark.stats.stats.data]
    cuts = [statistics.median(ms), *records.percentiles(ms).values()]
    if DEVICE.type == "cuda":
        cuts = do_bench(call, quantiles=(0.5, 0.2, 0.8))
    return {**dict(zip(("ms", "ms_p20", "ms_p80"), cuts)), "call ms": statistics.median(ms)}
