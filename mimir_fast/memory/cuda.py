"""Differences of CUDA from fake CPU tensors: attention's layout, and bytes that kernels need while they run."""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch._ops import OpOverload

aten = torch.ops.aten
# Of an H100, and of one of its multiprocessors.
MULTIPROCESSORS, THREADS = 132, 2048


class Scratch(NamedTuple):
    """Bytes a kernel needs while it runs: per_image times the batch, but no more than `most`."""

    per_image: float = 0.0
    most: float = math.inf


def _attention(query: Tensor, key: Tensor, value: Tensor, *_, **__) -> tuple[Tensor, Tensor]:
    """Outputs of scaled_dot_product_attention on CUDA: flash in 16 bits, memory-efficient in fp32."""
    if query.dtype == torch.float32:
        return aten._scaled_dot_product_efficient_attention.default(query, key, value, None, True)[:2]
    return aten._scaled_dot_product_flash_attention.default(query, key, value)[:2]


def _attention_backward(grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, *_, **__):
    """Gradients of `_attention`: three tensors in CUDA's layout."""
    seed = query.new_empty((), dtype=torch.int64)
    if query.dtype == torch.float32:
        efficient = (grad, query, key, value, None, out, lse, seed, seed, 0.0, [True, True, True, False])
        return aten._scaled_dot_product_efficient_attention_backward.default(*efficient)[:3]
    lengths = (query.shape[2], key.shape[2])
    flash = (grad, query, key, value, out, lse, None, None, *lengths, 0.0, False, seed, seed)
    return aten._scaled_dot_product_flash_attention_backward.default(*flash)


# What autograd and AOTAutograd see for fake CPU tensors -> what they would see for CUDA's.
ON_CUDA: dict[OpOverload, Callable] = {
    aten._scaled_dot_product_flash_attention_for_cpu.default: _attention,
    aten._scaled_dot_product_flash_attention_for_cpu_backward.default: _attention_backward,
}


def _flash_sums(batch: int, grad: Tensor, query: Tensor, *_, **__) -> Scratch:
    """fp32 sums of dq [B,N,T,d] and of grad * out [B,N,T], T rounded up to 128 and d to 32."""
    B, N, T, d = query.shape
    # The backward kernel adds up dq in fp32, in whole tiles.
    return Scratch(4 * B * N * math.ceil(T / 128) * 128 * (math.ceil(d / 32) * 32 + 1) / batch)


def _column_sums(batch: int, rows: Tensor, dims: list[int] | None = None, *_, **__) -> Scratch:
    """A bias gradient, ATen's sum over all dimensions but the last: partial sums by blocks of 32 x 4 threads, 4 columns each.

    Room for 128 numbers per column and block row; each thread sums 16 rows or more, and the grid does not exceed what the GPU
    runs at once.
    """
    if not dims or rows.ndim < 2 or sorted(d % rows.ndim for d in dims) != list(range(rows.ndim - 1)):
        return Scratch()
    columns = rows.shape[-1]
    # A block has 4 rows of threads: each adds up a quarter of a column.
    per_thread = rows.numel() // columns / 4
    # From here on ATen splits a column over several blocks, which need room for their partial sums.
    if per_thread < 256 or not rows.is_contiguous() or columns % 4:
        return Scratch()
    most = math.ceil(MULTIPROCESSORS * (THREADS // 128) / math.ceil(columns / 128))
    return Scratch(4 * columns * 128 * per_thread / 16 / batch, 4 * columns * 128 * most)


SCRATCH: dict[OpOverload, Callable[..., Scratch]] = {
    aten._scaled_dot_product_flash_attention_backward.default: _flash_sums,
    aten.sum.dim_IntList: _column_sums,
}


def scratch_of(func, batch: int, *args, **kwargs) -> Scratch:
    """Bytes that an operator needs while it runs, from its arguments in the fake run with `batch` images."""
    return SCRATCH[func](batch, *args, **kwargs) if func in SCRATCH else Scratch()
