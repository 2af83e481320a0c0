"""One operation at one shape in one dtype, and whether an implementation of it is right.

bench/kernels/cases.py has the cases of all operations: tests hold the kernels to them, benchmarks time them.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from tests.support.budget import beyond_budget

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
Inputs = dict[str, object]  # an operation's keyword arguments


@dataclass(frozen=True)
class Case:
    """What is computed, and who computes it.

    op, shape     the operation's name; what tells this case from its others, e.g. {"B": 512, "L": 196}
    dtype         storage of images, activations and 16-bit weights (a key of DTYPES)
    draw          fresh random inputs on the default device, keyword arguments; gradients are taken in those that ask
    function      the operation itself: takes the inputs and impl="triton" or "reference"
    rivals        implementations from elsewhere, by name; each takes the inputs
    refused       why impl="triton" does not offer this case; "" if it does
    judge         (value, eager's, float64's) -> what is wrong with the value, or ""
    own_judges    rivals whose values differ by right, such as other random numbers: (value, inputs) -> what is wrong, or ""
    usual         the dtype in which a recipe on a GPU has it: timed first
    part          of the model, where an operation has a case in more than one: encoder, decoder
    """

    op: str
    shape: dict[str, int]
    dtype: str
    draw: Callable[[], Inputs]
    function: Callable[..., Tensor | tuple[Tensor, ...]]
    rivals: dict[str, Callable[..., Tensor]] = field(default_factory=dict)
    refused: str = ""
    judge: Callable[[Tensor, Tensor, Tensor], str] = beyond_budget
    own_judges: dict[str, Callable[[Tensor, Inputs], str]] = field(default_factory=dict)
    usual: str = "bf16"
    part: str = ""

    def ours(self, **inputs):
        return self.function(**inputs, impl="triton")

    def reference(self, **inputs):
        return self.function(**inputs, impl="reference")

    @property
    def label(self) -> str:
        return f"{self.op} {self.dtype} " + " ".join(f"{name}{size}" for name, size in self.shape.items())


def leaves(inputs: Inputs) -> dict[str, Tensor]:
    """The inputs whose gradients are taken."""
    return {name: t for name, t in inputs.items() if isinstance(t, Tensor) and t.requires_grad}


def outputs(result: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


@dataclass
class Drawn:
    """A case's inputs with a random gradient for each floating-point output, and what is true of them in float64."""

    case: Case
    device: torch.device

    def __post_init__(self):
        torch.manual_seed(0)
        with self.device:
            self.inputs = self.case.draw()
        results = outputs(self.case.reference(**self.inputs))
        self.upstream = [torch.randn_like(r) if r.is_floating_point() else None for r in results]

    def values(self, function: Callable, inputs: Inputs | None = None) -> dict[str, Tensor]:
        """Outputs and the gradient of every leaf, by name."""
        inputs = self.inputs if inputs is None else inputs
        results, wanted = outputs(function(**inputs)), leaves(inputs)
        found = {f"output {number}": result.detach() for number, result in enumerate(results)}
        if wanted:
            given = [(r, g.to(r.dtype)) for g, r in zip(self.upstream, results) if g is not None]
            grads = torch.autograd.grad([r for r, _ in given], list(wanted.values()), [g for _, g in given])
            found |= {f"gradient of {name}": grad for name, grad in zip(wanted, grads)}
        return found

    @cached_property
    def truth(self) -> dict[str, Tensor]:
        """Of the same numbers in float64."""
        wide = dict(self.inputs)
        for name, tensor in self.inputs.items():
            if isinstance(tensor, Tensor) and tensor.is_floating_point():
                wide[name] = tensor.detach().double().requires_grad_(tensor.requires_grad)
        return self.values(self.case.reference, wide)

    @cached_property
    def eager(self) -> dict[str, Tensor]:
        return self.values(self.case.reference)

    def wrong(self, name: str, found: dict[str, Tensor]) -> str:
        """What is wrong with the values of an implementation; "" if nothing is."""
        if name in self.case.own_judges:
            return self.case.own_judges[name](found["output 0"], self.inputs)
        for part, truth in self.truth.items():
            value, eager = found[part], self.eager[part]
            if value.dtype != eager.dtype:
                return f"{part}: {value.dtype}, expected {eager.dtype}"
            if complaint := self.case.judge(value, eager, truth):
                return f"{part}: {complaint}"
        return ""
