"""Costs of short_attention's operators; see kernels/_shared/cost.py."""

from torch import Tensor

from mimir_fast.kernels._shared.cost import ARITHMETIC, Cost, size


def short_attention(results: list[Tensor], qkv_BTQ: Tensor, bias_Q: Tensor | None, num_heads: int, _: int) -> Cost:
    """qkv read, the output and what is kept beside it written; two products."""
    return _attention(4, qkv_BTQ, results[0], results[1])


def short_attention_grad(results: list[Tensor], grad_BRD: Tensor, qkv_BTQ: Tensor, *kept_and_sizes) -> Cost:
    """qkv, the gradient and what was kept read, qkv's gradient written; the scores again, and four products.

    For bias partial sums per image, in fp32 written and read; of fp32 storage qkv's gradient read.
    """
    kept = [t for t in kept_and_sizes if isinstance(t, Tensor)]
    grad_qkv_BTQ, grad_bias_Q = results
    B, T, _ = qkv_BTQ.shape
    partial = grad_bias_Q.numel() * B * (2 * 4 if qkv_BTQ.itemsize == 2 else 4 * T)
    return _attention(10, qkv_BTQ, grad_BRD, grad_qkv_BTQ, grad_bias_Q, *kept, more=partial)


def _attention(flops: float, qkv_BTQ: Tensor, out_BRD: Tensor, *others: Tensor, more: int = 0) -> Cost:
    """flops: per number of the output, or of its gradient, and key; more: bytes beside the tensors'."""
    products = {ARITHMETIC[qkv_BTQ.dtype]: flops * out_BRD.numel() * qkv_BTQ.shape[1]}
    return Cost(size(qkv_BTQ, out_BRD, *others) + more, products, kind="attention")
