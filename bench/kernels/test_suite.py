"""pytest bench --benchmark-only: the cases of python -m bench kernels under pytest-benchmark, which stores and compares runs.

On a GPU all recipes and dtypes (choose with -k), wall clock with the wait for the device; on a CPU the references, small.
"""

import itertools
from collections.abc import Iterator

import pytest
import torch

from bench.harness import WallClock, cache_bytes
from bench.kernels.case import DTYPES, leaves
from bench.kernels.cases import DIRECTIONS, Prepared, Setting, contender, contenders, fresh_compiler, prepare
from bench.kernels.suite import OPS, SIZES, entries
from bench.step.counts import pretend_gpu
from bench.training import device_name
from mimir_fast.training.distributed import World

pytest.importorskip("pytest_benchmark", reason="pip install 'mimir-fast[dev]' brings pytest-benchmark")
if pretend_gpu():
    pytest.skip("a pretend GPU has no times", allow_module_level=True)
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ON_GPU = [name for name in SIZES if name != "small"], list(DTYPES)
ENTRIES = entries(list(OPS), *(ON_GPU if DEVICE.type == "cuda" else (["small"], ["fp32"])))
SETTING = Setting(DEVICE, WallClock(), {}, cache_bytes(DEVICE))
ROUNDS = 20


def jobs() -> Iterator:
    for entry in ENTRIES:
        for name, direction in itertools.product(contenders(entry.case, SETTING), DIRECTIONS):
            yield pytest.param(entry, name, direction, id=f"{entry.recipes[0]}-{entry.case.label}-{name}-{direction}")


@pytest.fixture(scope="module")
def prepared(request) -> Iterator[Prepared]:
    """A case with its inputs drawn and its contenders checked."""
    with fresh_compiler():
        yield prepare(request.param.case, SETTING)


@pytest.mark.parametrize(("prepared", "name", "direction"), list(jobs()), indirect=["prepared"])
def test_speed(prepared: Prepared, name: str, direction: str, benchmark):
    status, why = prepared.trouble.get(name, ("", ""))
    if status == "refused":
        pytest.skip(why)
    assert not status, why
    if direction != "forward" and not leaves(prepared.sets[0][0]):
        pytest.skip("nothing to differentiate")
    run = contender(prepared.contenders[name], prepared.sets, direction)
    numbers = itertools.cycle(range(len(prepared.sets)))

    def once() -> None:
        run(next(numbers))
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    known = prepared.work.get(direction)
    benchmark.group = f"{prepared.case.label} {direction}"
    benchmark.extra_info |= {"device": device_name(World(device=DEVICE), None), "bytes": known and known.bytes}
    benchmark.pedantic(once, rounds=ROUNDS, warmup_rounds=2)
