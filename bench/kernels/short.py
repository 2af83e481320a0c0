"""Short kernels: Proton's time of the kernels alone, where CUDA events around a call also see the gaps between launches."""

import json
import tempfile
from pathlib import Path

import torch

from bench.harness import Contender
from bench.proton import Session, kernel_times

SHORT = 0.1  # ms: longer calls hide the gaps
CALLS = 50


def kernel_ms(contender: Contender, sets: int) -> float:
    """Milliseconds that the device spends in one call's kernels: the mean of 50 calls on rotating inputs."""
    with tempfile.TemporaryDirectory() as folder:
        session = Session(Path(folder) / "short")
        session.start()
        try:
            for number in range(CALLS):
                contender(number % sets)
            torch.cuda.synchronize()
        finally:
            session.stop()
        tree = json.loads(session.name.with_suffix(".hatchet").read_text())
    return sum(us for _, us in kernel_times(tree).values()) / CALLS / 1e3
