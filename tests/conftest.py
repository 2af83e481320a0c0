"""Shared by all tests: two threads in all, fixed seeds, NaN in uninitialised memory."""

import os

import pytest
import torch

pytest.register_assert_rewrite("tests.support.crop_checks")
THREADS = max(1, 2 // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1")))
# Sums depend on the number of threads: the same for runs in processes of their own, and for fixtures of whole modules.
os.environ["OMP_NUM_THREADS"] = str(THREADS)
torch.set_num_threads(THREADS)


@pytest.fixture(autouse=True)
def _deterministic():
    torch.set_num_threads(THREADS)
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True, warn_only=True)  # also fills uninitialised memory with NaN
    yield
    torch.use_deterministic_algorithms(False)
    torch.set_num_threads(THREADS)
