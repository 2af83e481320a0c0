"""Costs of short_attention's operators; see kernels/_shared/cost.py."""

from torch import Tensor

from mimir_fast.kernels._shared.cost import ARITHMETIC, Cost, size


def short_attention(results: list[Tensor], qkv_BTQ: Tensor, num_heads: int) -> Cost:
    """qkv read, the output written; two products."""
    return _attention(4, qkv_BTQ, *results)


def short_attention_grad(results: list[Tensor], grad_BTD: Tensor, qkv_BTQ: Tensor, num_heads: int) -> Cost:
    """qkv and the gradient read, qkv's gradient written; the scores again, and four products."""
    return _attention(10, qkv_BTQ, grad_BTD, *results)


def _attention(flops: int, qkv_BTQ: Tensor, *others: Tensor) -> Cost:
    """flops: per head's number and pair of tokens."""
    products = {ARITHMETIC[qkv_BTQ.dtype]: flops * qkv_BTQ.numel() * qkv_BTQ.shape[1] / 3}
    return Cost(size(qkv_BTQ, *others), products, kind="attention")
