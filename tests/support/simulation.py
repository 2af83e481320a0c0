"""The simulated GPU for tests, which are skipped with the reason where it cannot be built or does not know this torch."""

import os
import subprocess
from pathlib import Path

import pytest

from bench.simulated_gpu import environment
from bench.simulated_gpu.build import missing, unsuitable

ROOT = Path(__file__).parents[2]
REASON = missing() or unsuitable()


def needs_simulated_gpu(test):
    """Marks a test, or a case of one; whatever runs there takes seconds."""
    return pytest.mark.slow(pytest.mark.skipif(bool(REASON), reason=REASON)(test))


def run_simulated(command: list, log: Path | str = os.devnull, gpu: str = "h100", memory_mib: int | None = None) -> str:
    """What a command prints that finds a simulated GPU; its exit status must be 0."""
    found = environment(gpu, log, memory_mib) | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(list(map(str, command)), cwd=ROOT, env=found, capture_output=True, text=True, timeout=3000)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
