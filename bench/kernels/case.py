"""One operation at one shape in one dtype."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from bench.budget import beyond_budget

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
Inputs = dict[str, object]  # an operation's keyword arguments


@dataclass(frozen=True)
class Case:
    """What is computed, and who computes it.

    op, shape     the operation's name; what tells this case from its others, e.g. {"B": 512, "L": 196}
    dtype         storage of images, activations and 16-bit weights (a key of DTYPES)
    draw          device -> fresh random inputs, the operation's keyword arguments; gradients are taken in those that ask
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
    draw: Callable[[torch.device], Inputs]
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


def random_order(B: int, L: int, device: torch.device) -> Tensor:
    """Patches [B,L] in random order, int64."""
    return torch.rand(B, L, device=device).argsort(dim=1)
