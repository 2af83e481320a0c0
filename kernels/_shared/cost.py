"""Cost: what a call of an operator cannot avoid; the `bytes` lines of the docstrings as formulas, for the roofline.

An operator reads every argument once and writes every result once, unless kernels/OP/cost.py has a function of its name:
(results, *arguments) -> Cost.
"""

import importlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

# Whose peak bounds a product of this storage: fp32 products are made of tf32 ones.
ARITHMETIC = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "tf32"}


@dataclass(frozen=True)
class Cost:
    """Bytes from and to memory, not what is read again from cache; FLOPs by arithmetic, a multiply-add is two.

    solves   dense solves inside: ATen's name and the number of rows
    kind     what the roofline counts it as: ours, GEMM or attention
    """

    bytes: float
    flops: dict[str, float] = field(default_factory=dict)
    solves: list[tuple[str, int]] = field(default_factory=list)
    kind: str = "ours"


def size(*tensors: Tensor | None) -> int:
    """Bytes of the distinct elements: of a dimension that is expanded, one counts."""
    total = 0
    for tensor in tensors:
        if tensor is not None:
            distinct = tensor.element_size()
            for length, stride in zip(tensor.shape, tensor.stride()):
                distinct *= length if stride else min(length, 1)
            total += distinct
    return total


def cost(operator: str, arguments: Iterable, results: list[Tensor]) -> Cost:
    """The cost of a call of mimir_fast::operator."""
    arguments = list(arguments)
    if own := _own_costs().get(operator):
        return own(results, *arguments)
    read = [a for a in arguments if isinstance(a, Tensor) and not any(a is written for written in results)]
    return Cost(size(*read, *results))


@lru_cache
def _own_costs() -> dict[str, Callable[..., Cost]]:
    """The functions of every kernels/OP/cost.py, by name."""
    found: dict[str, Callable[..., Cost]] = {}
    for path in sorted(Path(__file__).parents[1].glob("[!_]*/cost.py")):
        found |= vars(importlib.import_module(f"mimir_fast.kernels.{path.parent.name}.cost"))
    return found
