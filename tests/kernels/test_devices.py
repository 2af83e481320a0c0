"""Every operation on the device it is made for: on a GPU at the sizes of real runs, without one in the interpreter.

Outputs and gradients of the benchmarks' cases against the reference in float64; bitwise repeats; no host synchronisation.
"""

from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch

from bench.kernels.cases import OPS, SIZES, Size, cases
from tests.support.cases import DTYPES, Case, Drawn
from tests.support.interpreter import interpret

CUDA = torch.device("cuda")
on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here: the interpreter only")
SMALL = Size(B=5, side=24, p=8, K=2, D=64, N=2, E=64, R=4)
REAL = replace(SIZES["imagenet_vit_b"], B=64)


def offered(op: str, size: Size, dtype: str) -> list[Case]:
    """The cases that the kernels take."""
    return [case for case in cases(op, size, dtype) if not case.refused]


@pytest.mark.parametrize("device", ["interpreter", pytest.param("cuda", marks=on_gpu)])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", OPS)
def test_outputs_and_gradients(op, dtype, device):
    where, size, context = (
        (CUDA, REAL, nullcontext()) if device == "cuda" else (torch.device("cpu"), SMALL, interpret())
    )
    with context:
        if not (chosen := offered(op, size, dtype)):
            pytest.skip("not offered")
        for case in chosen:
            drawn = Drawn(case, where)
            ours, again = (drawn.values(case.ours) for _ in range(2))
            assert [name for name, value in ours.items() if not torch.equal(value, again[name])] == [], case.label
            assert drawn.wrong("ours", ours) == "", case.label


@on_gpu
@pytest.mark.parametrize("op", OPS)
def test_no_host_synchronisation(op):
    for case in offered(op, replace(REAL, B=4), "bf16"):
        drawn = Drawn(case, CUDA)
        drawn.values(case.ours)  # compiles
        torch.cuda.set_sync_debug_mode("error")
        try:
            drawn.values(case.ours)
        finally:
            torch.cuda.set_sync_debug_mode("default")
