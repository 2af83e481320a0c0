"""A case that is timed: what its implementations are, what is called, and what it costs at least."""

from collections.abc import Callable
from functools import cached_property
from itertools import chain

import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

from bench.step.prices import Price
from bench.step.trace import record
from tests.support.cases import Drawn, leaves, outputs

COUNTED = ("ours", "GEMM", "attention")  # classes of bench/step/prices.py: not the views and copies around them


class Timed(Drawn):
    """A case's inputs, its implementations, and its work."""

    @cached_property
    def work(self) -> dict[str, list[Price]]:
        """What no implementation can avoid, by the costs of the operators that ours calls; empty if ours refuses the case.

        By direction: forward, and with a differentiable input backward and both.
        """
        if self.case.refused:
            return {}

        def counted(call: Callable[[], object]) -> list[Price]:
            return [p for p in chain(*record(call, "cpu")) if p.kind in COUNTED]

        with FakeTensorMode():
            inputs = self.case.draw(torch.device("cpu"))
            results: list[Tensor] = []
            found = {"forward": counted(lambda: results.extend(outputs(self.case.ours(**inputs))))}
            if wanted := list(leaves(inputs).values()):
                upstream = [torch.ones_like(result) for result in results]
                found["backward"] = counted(lambda: torch.autograd.grad(results, wanted, upstream))
                found["both"] = found["forward"] + found["backward"]
        return found

    @cached_property
    def compiled(self) -> Callable:
        return torch.compile(self.case.reference, dynamic=False)

    def implementation(self, name: str) -> Callable:
        if name == "compiled":
            return self.compiled
        return {"ours": self.case.ours, "eager": self.case.reference, **self.case.rivals}[name]

    def call(self, function: Callable, direction: str) -> Callable[[], object]:
        """What is timed.  backward starts from outputs that are kept."""
        wanted = list(leaves(self.inputs).values())
        if direction == "forward":
            return lambda: function(**self.inputs)
        if direction == "both":
            return lambda: torch.autograd.grad(outputs(function(**self.inputs)), wanted, self.upstream)
        kept = outputs(function(**self.inputs))
        return lambda: torch.autograd.grad(kept, wanted, self.upstream, retain_graph=True)
