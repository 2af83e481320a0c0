"""The error budget, and the cases that are held to it: what they must see."""

import torch

from tests.support.budget import beyond_budget
from tests.support.cases import Case, Drawn


def test_the_budget_sees_the_worst_element_and_the_mean():
    truth = torch.linspace(1, 2, 1000, dtype=torch.float64)
    eager, one, everywhere = (truth.float() for _ in range(3))
    eager[0] += 1e-4
    one[7] += 1e-3
    everywhere += 1.5e-4
    assert beyond_budget(eager, eager, truth) == ""
    assert "at worst" in beyond_budget(one, eager, truth)
    assert "in the mean" in beyond_budget(everywhere, eager, truth)


def test_wrong_values_gradients_shapes_and_dtypes_are_seen():
    def wrong_gradient(x):
        return x.square().detach() + 2.002 * (x * x.detach() - x.detach() * x.detach())

    case = Case("square", {"n": 6}, "fp32", lambda: {"x": torch.randn(6).requires_grad_()}, lambda x, impl: x * x)
    drawn = Drawn(case, torch.device("cpu"))
    wrong = {
        "right": (torch.square, ""),
        "value": (lambda x: x.square() * 1.001, "output 0: off by"),
        "gradient": (wrong_gradient, "gradient of x: off by"),
        "nan": (lambda x: x.square() * torch.nan, "output 0: off by nan"),
        "dtype": (lambda x: x.double() ** 2, "output 0: torch.float64, expected torch.float32"),
    }
    for name, (function, why) in wrong.items():
        assert drawn.wrong(name, drawn.values(function)).startswith(why), name
        assert bool(drawn.wrong(name, drawn.values(function))) == bool(why), name
    flat = Drawn(Case("square", {}, "fp32", lambda: {"x": torch.randn(6)}, lambda x, impl: x * x), torch.device("cpu"))
    assert "shape (1,)" in flat.wrong("short", flat.values(lambda x: x[:1].square()))
