"""Every operation against its rivals: held to float64 first, then timed.  `python -m bench kernels` starts it.

What is wrong, or raises, fails its test and is on record; what is not offered is skipped.
"""

from collections.abc import Iterator

import pytest
import torch

from bench.kernels.case import Drawn, leaves
from bench.kernels.conftest import DEVICE
from bench.kernels.timing import timed
from bench.kernels.work import work
from bench.simulated_gpu import marker


@pytest.fixture(scope="module")
def drawn(request) -> Iterator[Drawn]:
    """A case's inputs; nothing compiled for another case counts against this one, buffers of kept graphs are not given away."""
    torch._dynamo.reset()
    with torch._functorch.config.patch(donated_buffer=False):
        found = Drawn(request.param.case, DEVICE)
        found.work, found.known = work(found.case), {}
        yield found


def implementation(drawn: Drawn, name: str):
    """The function of that name, compiled once per case."""
    case = drawn.case
    if name not in drawn.known:
        compiled = torch.compile(case.reference, dynamic=False) if name == "compiled" else None
        drawn.known[name] = compiled or {"ours": case.ours, "eager": case.reference, **case.rivals}[name]
    return drawn.known[name]


def test_speed(drawn, name, direction, benchmark, note):
    if direction != "forward" and not leaves(drawn.inputs):
        pytest.skip("nothing to differentiate")
    if name == "ours" and drawn.case.refused:
        note("refused", drawn.case.refused)
        pytest.skip(drawn.case.refused)
    try:
        function = implementation(drawn, name)
        wrong = "" if marker() else drawn.wrong(name, function)
        call = drawn.call(function, direction)
        times = None if wrong or marker() else timed(call, benchmark, DEVICE)
        if marker():  # there are no times
            benchmark(call)
    except Exception as error:
        note("failed", " ".join(f"{type(error).__name__}: {error}".split())[:200])
        raise
    note("wrong" if wrong else "simulated" if marker() else "ok", wrong, times)
    assert not wrong
