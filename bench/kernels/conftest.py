"""Options of `pytest bench/kernels`, what its tests are made of, and the record that each of them leaves."""

import itertools
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from bench import records, steps
from bench.kernels.suite import ON_CPU, ON_GPU, OPS, entries
from bench.kernels.work import figures
from bench.peaks import PEAKS
from bench.train import peaks_of

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DIRECTIONS = ("forward", "backward", "both")
CONTEXT_LOST = 75  # exit status where the GPU answers no more
TIMES = ("ms", "ms_p20", "ms_p80", "call ms")


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
    steps.leave_cudnn_out()
    found = entries(option("ops") or list(OPS), option("recipes") or recipes, option("dtypes") or dtypes)
    jobs: list = []
    for entry in found:
        names = [*(["ours"] if DEVICE.type == "cuda" else []), "eager", "compiled", *entry.case.rivals]
        for name, direction in itertools.product(names, DIRECTIONS):
            identity = f"{entry.recipes[0]} {entry.case.label} {name} {direction}"
            jobs.append(pytest.param(entry, len(jobs), name, direction, id=identity))
    metafunc.parametrize(("drawn", "number", "name", "direction"), jobs[option("first") :], indirect=["drawn"])


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
def note(request, drawn, name, direction) -> Callable[..., None]:
    """Appends the measurement's record: note(status, why, times)."""
    case, entry, file = drawn.case, request.node.callspec.params["drawn"], request.config.getoption("results")
    device = records.device_name(DEVICE)

    def append(status: str, why: str = "", times: dict | None = None) -> None:
        what = {"op": case.op, "config": case.shape, "dtype": case.dtype, "direction": direction, "impl": name}
        row = {"kind": "kernels", **entry.names(), **what, "status": status, "why": why, **dict.fromkeys(TIMES)}
        if known := drawn.work.get(direction):
            gpu = peaks_of(device, None)
            row |= figures(known, PEAKS.get(gpu) if gpu else None)
        if file:
            records.append({**records.heading(device), **row, **(times or {})}, file)

    return append
