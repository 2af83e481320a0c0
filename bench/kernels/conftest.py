"""Options of `pytest bench/kernels`, what its tests are made of, and the record that each leaves."""

import itertools
import time
from collections.abc import Callable

import pytest
import torch

from bench import records, steps
from bench.kernels.suite import ON_CPU, ON_GPU, OPS, entries
from bench.peaks import PEAKS
from bench.step.roofline import sums

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DIRECTIONS = ("forward", "backward", "both")


def pytest_addoption(parser):
    add = parser.getgroup("mimir_fast").addoption
    for name in ("ops", "recipes", "dtypes"):
        add(f"--{name}", type=records.words, metavar="A,B", help="see python -m bench kernels -h")
    add("--seconds", type=float, help="for everything")
    add("--results", metavar="FILE", help="JSON lines to append to (default: none)")


def pytest_generate_tests(metafunc):
    """One test for each case, implementation and direction, the most important first."""
    option, (recipes, dtypes) = metafunc.config.getoption, ON_CPU if DEVICE.type == "cpu" else ON_GPU
    steps.leave_cudnn_out()
    jobs = []
    for entry in entries(option("ops") or list(OPS), option("recipes") or recipes, option("dtypes") or dtypes):
        names = [*(["ours"] if DEVICE.type == "cuda" else []), "eager", "compiled", *entry.case.rivals]
        for name, direction in itertools.product(names, DIRECTIONS):
            identity = f"{entry.recipes[0]} {entry.case.label} {name} {direction}"
            jobs.append(pytest.param(entry, name, direction, id=identity))
    metafunc.parametrize(("drawn", "name", "direction"), jobs, indirect=["drawn"])


@pytest.fixture(scope="session")
def started() -> float:
    return time.monotonic()


@pytest.fixture(autouse=True)
def in_time(request, started):
    """Skips what there is no time for, and ends everything after a measurement that the GPU did not survive."""
    seconds = request.config.getoption("seconds")
    if seconds is not None and time.monotonic() - started > seconds:
        pytest.skip("out of time")
    yield
    try:
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()
    except RuntimeError as error:
        pytest.exit(f"{request.node.name}: the GPU answers no more: {error}", returncode=1)


@pytest.fixture
def note(request, drawn, name, direction) -> Callable[..., None]:
    """Appends the measurement's record: note(status, why, times)."""
    case, entry, file = drawn.case, request.node.callspec.params["drawn"], request.config.getoption("results")
    device = records.device_name(DEVICE)

    def append(status: str, why: str = "", times: dict | None = None) -> None:
        what = {"op": case.op, "config": case.shape, "dtype": case.dtype, "direction": direction, "impl": name}
        row = {"kind": "kernels", **entry.names(), **what, "status": status, "why": why}
        row |= dict.fromkeys(("ms", "ms_p20", "ms_p80", "call ms")) | (times or {})
        if known := drawn.work.get(direction):
            gpu = records.peaks_of(device)
            found = sums(known, PEAKS[gpu] if gpu else None)
            row |= {"GB": found["gb"], "TFLOP": found["tflop"], "bound ms": found["bound_ms"]}
        if file:
            records.append({**records.heading(device), **row}, file)

    return append
