"""The error budget of bench/budget.py as an assertion."""

from torch import Tensor

from bench.budget import beyond_budget


def assert_within_budget(value: Tensor, eager: Tensor, truth: Tensor, name: str = ""):
    """Fails with the name and what is wrong."""
    wrong = beyond_budget(value, eager, truth)
    assert not wrong, (name, wrong)
