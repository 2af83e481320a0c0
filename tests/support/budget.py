"""The error budget as an assertion: see mimir_fast/tuning/budget.py."""

from torch import Tensor

from mimir_fast.tuning.budget import beyond_budget


def assert_within_budget(value: Tensor, eager: Tensor, truth: Tensor, name: str = ""):
    """Fails with the name and what is wrong."""
    wrong = beyond_budget(value, eager, truth)
    assert not wrong, (name, wrong)
