"""Shared by the tests of the benchmarks."""

import pytest


@pytest.fixture(autouse=True)
def _own_pytest(monkeypatch):
    """pytest-benchmark times nothing where it sees a worker of xdist, also one that it inherited by its environment."""
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)
