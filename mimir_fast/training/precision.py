"""Mixed precision: fp32 parameters for the optimizer, 16-bit copies of matrices for the arithmetic, cast once per update."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


@contextmanager
def full_precision() -> Iterator[None]:
    """Context in which matrix products and convolutions of fp32 are not rounded to tf32, whatever was set before."""
    products, convolutions = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(products)
        torch.backends.cudnn.allow_tf32 = convolutions


class ComputeCopy:
    """A model whose linear layers hold 16-bit copies of the fp32 model's; every other parameter is the same object.

    module   computes with the copies and collects their gradients
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype):
        linear = [m for m in model.modules() if isinstance(m, nn.Linear)]
        self.parameters: list[Tensor] = [p for m in linear for p in m.parameters(recurse=False)]
        self.copies: list[Tensor] = [
            nn.Parameter(p.detach().to(dtype), requires_grad=p.requires_grad) for p in self.parameters
        ]
        shared = {id(p): p for p in [*model.parameters(), *model.buffers()]}
        replaced = {id(p): c for p, c in zip(self.parameters, self.copies)}
        # The right one wins: what is replaced is in `shared` as well.
        self.module = copy.deepcopy(model, memo=shared | replaced)

    @torch.no_grad()
    def take_gradients(self) -> None:
        """Add the copies' gradients to those of the fp32 parameters and clear them; call it after every backward pass."""
        # (gradient of a parameter, gradient of its copy); all of a list in one launch, whatever the number of layers.
        first: list[tuple[Tensor, Tensor]] = []
        later: list[tuple[Tensor, Tensor]] = []
        for p, c in zip(self.parameters, self.copies):
            if c.grad is None:
                continue
            if p.grad is not None:
                later.append((p.grad, c.grad))
            else:
                p.grad = torch.empty_like(p)
                first.append((p.grad, c.grad))
            c.grad = None
        if later:
            torch._foreach_add_([ours for ours, _ in later], [theirs for _, theirs in later])
        if first:
            torch._foreach_copy_([ours for ours, _ in first], [theirs for _, theirs in first])

    @torch.no_grad()
    def refresh(self) -> None:
        """Cast the fp32 parameters into the copies; call it after every update."""
        torch._foreach_copy_(self.copies, self.parameters)
