"""Values and gradients of an implementation against float64 on the same rounded inputs."""

from collections.abc import Callable

import torch
from torch import Tensor

from bench.kernels.case import Case, Inputs, leaves, outputs

Values = dict[str, Tensor]


def values(function: Callable, inputs: Inputs, upstream: list[Tensor] | None) -> Values:
    """Outputs and, with one upstream gradient per output, the gradient of every leaf, by name."""
    results = outputs(function(**inputs))
    found = {f"output {number}": result.detach() for number, result in enumerate(results)}
    wanted = leaves(inputs)
    if wanted and upstream is not None:
        grads = torch.autograd.grad(results, list(wanted.values()), [g.to(r.dtype) for g, r in zip(upstream, results)])
        found |= {f"gradient of {name}": grad for name, grad in zip(wanted, grads)}
    return found


def upstream_like(results: tuple[Tensor, ...]) -> list[Tensor]:
    """A random gradient for each floating-point output."""
    return [torch.randn_like(result) if result.is_floating_point() else None for result in results]


def widened(inputs: Inputs) -> Inputs:
    """The same numbers in float64."""
    wide = dict(inputs)
    for name, tensor in inputs.items():
        if isinstance(tensor, Tensor) and tensor.is_floating_point():
            wide[name] = tensor.detach().double().requires_grad_(tensor.requires_grad)
    return wide


class Judge:
    """Knows the truth about one set of inputs, and what eager makes of them."""

    def __init__(self, case: Case, inputs: Inputs, upstream: list[Tensor]):
        self.case, self.inputs, self.upstream = case, inputs, upstream
        self.truth = values(case.reference, widened(inputs), upstream)
        self.eager = values(case.reference, inputs, upstream)

    def wrong(self, name: str, function: Callable) -> str:
        """What is wrong with a contender's values; "" if nothing is."""
        found = values(function, self.inputs, self.upstream)
        if name in self.case.own_judges:
            return self.case.own_judges[name](found["output 0"], self.inputs)
        for part, truth in self.truth.items():
            value, eager = found[part], self.eager[part]
            if value.dtype != eager.dtype:
                return f"{part}: {value.dtype}, expected {eager.dtype}"
            complaint = self.case.judge(value, eager, truth)
            if complaint:
                return f"{part}: {complaint}"
        return ""
