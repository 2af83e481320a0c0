"""Mixed precision: fp32 parameters for the optimizer, 16-bit matrices for the arithmetic, cast once per update."""

import copy

import torch
from torch import nn


class ComputeCopy:
    """A model whose linear layers hold 16-bit copies of the fp32 model's; every other parameter is the same object.

    module            computes with the copies and collects their gradients
    take_gradients()  adds the copies' gradients to the fp32 parameters' and clears them; call after every backward pass
    refresh()         casts the fp32 parameters into the copies; call after every update
    All three are a handful of launches, whatever the number of layers.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype):
        linear = [m for m in model.modules() if isinstance(m, nn.Linear)]
        self.parameters = [p for m in linear for p in m.parameters(recurse=False)]
        self.copies = [nn.Parameter(p.detach().to(dtype), requires_grad=p.requires_grad) for p in self.parameters]
        shared = {id(p): p for p in [*model.parameters(), *model.buffers()]}
        replaced = {id(p): c for p, c in zip(self.parameters, self.copies)}
        self.module = copy.deepcopy(model, memo=shared | replaced)

    @torch.no_grad()
    def take_gradients(self) -> None:
        pairs = [(p, c) for p, c in zip(self.parameters, self.copies) if c.grad is not None]
        first = [(p, c) for p, c in pairs if p.grad is None]
        later = [(p, c) for p, c in pairs if p.grad is not None]
        if later:
            torch._foreach_add_([p.grad for p, _ in later], [c.grad for _, c in later])
        if first:
            for p, _ in first:
                p.grad = torch.empty_like(p)
            torch._foreach_copy_([p.grad for p, _ in first], [c.grad for _, c in first])
        for _, c in pairs:
            c.grad = None

    @torch.no_grad()
    def refresh(self) -> None:
        torch._foreach_copy_(self.copies, self.parameters)
