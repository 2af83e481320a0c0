"""The error budget itself: what it must see."""

import torch

from tests.support.budget import beyond_budget


def test_the_budget_sees_the_worst_element_and_the_mean():
    truth = torch.linspace(1, 2, 1000, dtype=torch.float64)
    eager, one, everywhere = (truth.float() for _ in range(3))
    eager[0] += 1e-4
    one[7] += 1e-3
    everywhere += 1.5e-4
    assert beyond_budget(eager, eager, truth) == ""
    assert "at worst" in beyond_budget(one, eager, truth)
    assert "in the mean" in beyond_budget(everywhere, eager, truth)
