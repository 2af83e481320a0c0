"""The house: every operation in its place, references without Triton."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
OPS = sorted(path.parent.name for path in (ROOT / "kernels").glob("*/__init__.py"))


@pytest.mark.parametrize("op", OPS)
def test_every_operation_has_op_reference_kernel_and_test(op):
    for path in (*(f"kernels/{op}/{part}.py" for part in ("op", "reference", "kernel")), f"tests/kernels/test_{op}.py"):
        assert (ROOT / path).exists(), path


def test_operations_and_references_import_with_triton_blocked():
    modules = [f"mimir_fast.kernels.{op}.{part}" for op in OPS for part in ("op", "reference")]
    code = f"import sys, importlib; sys.modules['triton'] = None; [importlib.import_module(m) for m in {modules!r}]"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
