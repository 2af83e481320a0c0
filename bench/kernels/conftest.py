"""Options of `pytest bench/kernels`, and what its one test is made of: every case, implementation and direction."""

import time
from itertools import product

import pytest
import torch

from bench import records, steps
from bench.kernels.cases import ON_CPU, ON_GPU, OPS, entries

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
STARTED = time.monotonic()


def pytest_addoption(parser):
    add = parser.getgroup("mimir_fast").addoption
    for name in ("ops", "recipes", "dtypes"):
        add(f"--{name}", type=records.words, metavar="A,B", help="see python -m bench kernels -h")
    add("--seconds", type=float, help="for everything")
    add("--results", metavar="FILE", help="JSON lines to append to (default: none)")


def pytest_generate_tests(metafunc):
    """The most important first."""
    option, (recipes, dtypes) = metafunc.config.getoption, ON_CPU if DEVICE.type == "cpu" else ON_GPU
    steps.leave_cudnn_out()
    jobs = []
    for entry in entries(option("ops") or list(OPS), option("recipes") or recipes, option("dtypes") or dtypes):
        names = [*(["ours"] if DEVICE.type == "cuda" else []), "eager", "compiled", *entry.case.rivals]
        for name, direction in product(names, ("forward", "backward", "both")):
            identity = f"{entry.recipes[0]} {entry.case.label} {name} {direction}"
            jobs.append(pytest.param(entry, name, direction, id=identity))
    metafunc.parametrize(("timed", "name", "direction"), jobs, indirect=["timed"])


@pytest.fixture(autouse=True)
def in_time(request):
    """Skips what there is no time for, and ends everything after a measurement that the GPU did not survive."""
    seconds = request.config.getoption("seconds")
    if seconds is not None and time.monotonic() - STARTED > seconds:
        pytest.skip("out of time")
    yield
    try:
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()
    except RuntimeError as error:
        pytest.exit(f"{request.node.name}: the GPU answers no more: {error}", returncode=1)
