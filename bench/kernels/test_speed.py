"""Every operation against its rivals: held to float64 first, then timed.  `python -m bench kernels` starts it.

What is wrong, or raises, fails its test and is on record; what is not offered is skipped.
"""

import statistics
from collections.abc import Callable, Iterator

import pytest
import torch
from triton.testing import do_bench

from bench.kernels.case import Timed
from bench.kernels.conftest import DEVICE
from bench.records import percentiles
from bench.simulated_gpu import marker
from tests.support.cases import leaves


@pytest.fixture(scope="module")
def drawn(request) -> Iterator[Timed]:
    """A case's inputs; nothing compiled for another case counts against this one, buffers of kept graphs are not given away."""
    torch._dynamo.reset()
    with torch._functorch.config.patch(donated_buffer=False):
        yield Timed(request.param.case, DEVICE)


def test_speed(drawn, name, direction, benchmark, note):
    if direction != "forward" and not leaves(drawn.inputs):
        pytest.skip("nothing to differentiate")
    if name == "ours" and drawn.case.refused:
        note("refused", drawn.case.refused)
        pytest.skip(drawn.case.refused)
    benchmark.group = f"{drawn.case.label} {direction}"
    try:
        function = drawn.implementation(name)
        wrong = "" if marker() else drawn.wrong(name, drawn.values(function))
        times = None if wrong else timed(drawn.call(function, direction), benchmark)
    except Exception as error:
        note("failed", " ".join(f"{type(error).__name__}: {error}".split())[:200])
        raise
    note("wrong" if wrong else "simulated" if marker() else "ok", wrong, times)
    assert not wrong


def timed(call: Callable[[], object], benchmark) -> dict[str, float] | None:
    """ms, ms_p20, ms_p80: on a GPU the device's time, its cache emptied in between; elsewhere pytest-benchmark's.

    call ms: pytest-benchmark's, the host and on a GPU the wait for the device included.  A simulated GPU has no times.
    """
    if marker():
        benchmark(call)
        return None
    wait = torch.cuda.synchronize if DEVICE.type == "cuda" else lambda: None
    benchmark.pedantic(lambda: (call(), wait()), rounds=20, warmup_rounds=2)
    ms = [seconds * 1e3 for seconds in benchmark.stats.stats.data]
    cuts = [statistics.median(ms), *percentiles(ms).values()]
    if DEVICE.type == "cuda":
        cuts = do_bench(call, quantiles=(0.5, 0.2, 0.8))
    return {**dict(zip(("ms", "ms_p20", "ms_p80"), cuts)), "call ms": statistics.median(ms)}
