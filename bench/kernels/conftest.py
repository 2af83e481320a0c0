"""Options of `pytest bench/kernels`, what the tests are made of, and the record that each of them leaves."""

import itertools
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from bench import records, steps
from bench.kernels.suite import ON_CPU, ON_GPU, OPS, entries
from bench.kernels.timing import reached
from bench.simulated_gpu import marker

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DIRECTIONS = ("forward", "backward", "both")
CONTEXT_LOST = 75  # exit status where the GPU answers no more
TIMES = ("ms", "ms_p20", "ms_p80", "rounds", "call ms")


def pytest_addoption(parser):
    add = parser.getgroup("mimir_fast").addoption
    for name in ("ops", "recipes", "dtypes"):
        add(f"--{name}", type=records.words, metavar="A,B", help="see python -m bench kernels -h")
    add("--first", type=int, default=0, metavar="N", help="leave the first N measurements out")
    add("--progress", metavar="FILE", help="where to write which measurement is going on")
    add("--results", metavar="FILE", help="JSON lines to append to (default: none)")


def pytest_generate_tests(metafunc):
    """One test for each case, implementation and direction, the most important first."""
    option, (recipes, dtypes) = metafunc.config.getoption, ON_CPU if DEVICE.type == "cpu" else ON_GPU
    found = entries(option("ops") or list(OPS), option("recipes") or recipes, option("dtypes") or dtypes)
    jobs = []
    for entry in found:
        names = [*(["ours"] if DEVICE.type == "cuda" else []), "eager", "compiled", *entry.case.rivals]
        for name, direction in itertools.product(names, DIRECTIONS):
            identity = f"{entry.recipes[0]} {entry.case.label} {name} {direction}"
            jobs.append(pytest.param(entry, len(jobs), name, direction, id=identity))
    metafunc.parametrize(("drawn", "number", "name", "direction"), jobs[option("first") :], indirect=["drawn"])


@pytest.fixture(scope="session")
def peaks(request) -> dict[str, float]:
    """What the device reaches; a record of its own.  Nothing on a simulated GPU."""
    steps.leave_cudnn_out()
    if marker():
        return {}
    found = reached(DEVICE)
    _append(request, {"kind": "peaks", "reached": found})
    return found


@pytest.fixture(autouse=True)
def progress(request, number):
    """Says which measurement is going on, and ends the process after one that the GPU did not survive."""
    if file := request.config.getoption("progress"):
        Path(file).write_text(str(number))
    yield
    try:
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()
    except RuntimeError:
        os._exit(CONTEXT_LOST)


@pytest.fixture
def note(request, drawn, name, direction, peaks) -> Callable[..., None]:
    """Appends the measurement's record: note(status, why, times)."""
    case, entry = drawn.case, request.node.callspec.params["drawn"]

    def append(status: str, why: str = "", times: dict | None = None) -> None:
        what = {"op": case.op, "config": case.shape, "dtype": case.dtype, "direction": direction, "impl": name}
        row = {"kind": "kernels", **entry.names(), **what, "status": status, "why": why, **dict.fromkeys(TIMES)}
        if known := drawn.work.get(direction):
            row |= {
                "GB": known.bytes / 1e9,
                "TFLOP": sum(known.flops.values()) / 1e12,
                "bound ms": known.bound_ms(peaks),
            }
        _append(request, row | (times or {}))

    return append


def _append(request, row: dict) -> None:
    if file := request.config.getoption("results"):
        records.append({**records.heading(records.device_name(DEVICE)), **row}, file)
