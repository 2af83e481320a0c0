"""Where memory on CUDA differs from what fake CPU tensors show: attention's layout, and bytes that kernels need while they run.

B batch, T tokens, N heads, d width of a head; sizes in bytes.
"""

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

aten = torch.ops.aten
MULTIPROCESSORS, THREADS = (
    132,
    2048,
)  # of an H100 and of one of its multiprocessors: a bias gradient's scratch depends on them
GRAM_PARTS = (
    4 * 512 * 64 * 64 * 2
)  # nhsic's partial Gram products: PROGRAMS tiles and less than as many again (gram.py)


class Scratch(NamedTuple):
    """Bytes a kernel needs while it runs: min(most, constant + per_image * b + per_image2 * b^2)."""

    constant: float = 0.0
    per_image: float = 0.0
    per_image2: float = 0.0
    most: float = math.inf

    def at(self, batch: int) -> float:
        """Bytes at this batch."""
        return min(self.most, self.constant + self.per_image * batch + self.per_image2 * batch**2)


def attention(query: Tensor, key: Tensor, value: Tensor, *_, **__) -> tuple[Tensor, Tensor]:
    """What scaled_dot_product_attention leaves on CUDA (flash in 16 bits, memory-efficient in fp32), in place of the CPU's."""
    if query.dtype == torch.float32:
        return aten._scaled_dot_product_efficient_attention.default(query, key, value, None, True)[:2]
    return aten._scaled_dot_product_flash_attention.default(query, key, value)[:2]


def attention_backward(grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, *_, **__):
    """Gradients of `attention`: three tensors in CUDA's layout."""
    seed = query.new_empty((), dtype=torch.int64)
    if query.dtype == torch.float32:
        given = (grad, query, key, value, None, out, lse, seed, seed, 0.0, [True, True, True, False])
        return aten._scaled_dot_product_efficient_attention_backward.default(*given)[:3]
    lengths = (query.shape[2], key.shape[2])
    given = (grad, query, key, value, out, lse, None, None, *lengths, 0.0, False, seed, seed)
    return aten._scaled_dot_product_flash_attention_backward.default(*given)


ON_CUDA: dict[object, Callable] = {
    aten._scaled_dot_product_flash_attention_for_cpu.default: attention,
    aten._scaled_dot_product_flash_attention_for_cpu_backward.default: attention_backward,
}


def _up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def _flash(batch: int, grad: Tensor, query: Tensor, *_, **__) -> Scratch:
    """fp32 sums of dq and of grad * out, rows rounded up to 128 and a head's width to 32."""
    B, N, T, d = query.shape
    return Scratch(per_image=4 * B * N * _up(T, 128) * (_up(d, 32) + 1) / batch)


def _column_sums(batch: int, rows: Tensor, dims: list[int] | None = None, *_, **__) -> Scratch:
    """ATen's sum over all but the last dimension (a bias gradient): partial sums by blocks of 32 x 4 threads, 4 columns each.

    The buffer has room for 128 numbers per column and block row: each thread sums 16 rows or more, and the grid does not
    exceed what the GPU runs at once.
    """
    if not dims or rows.ndim < 2 or sorted(d % rows.ndim for d in dims) != list(range(rows.ndim - 1)):
        return Scratch()
    columns = rows.shape[-1]
    per_thread = rows.numel() // columns / 4
    if per_thread < 256 or not rows.is_contiguous() or columns % 4:
        return Scratch()
    blocks_wide = -(-columns // 128)
    most = -(-MULTIPROCESSORS * (THREADS // 128) // blocks_wide)
    return Scratch(per_image=4 * columns * 128 * per_thread / 16 / batch, most=4 * columns * 128 * most)


def _nhsic(batch: int, *_) -> Scratch:
    """Partial Gram products; the ridged matrix, its factor, its inverse and the solver's workspace."""
    return Scratch(constant=GRAM_PARTS, per_image2=4 * 6)


def _nhsic_grad(batch: int, *_) -> Scratch:
    """Four m x m matrices."""
    return Scratch(per_image2=4 * 4)


# by operator; ours are looked up by name, so that they need not be imported
SCRATCH: dict[object, Callable[..., Scratch]] = {
    aten._scaled_dot_product_flash_attention_backward.default: _flash,
    aten.sum.dim_IntList: _column_sums,
    "mimir_fast.nhsic.default": _nhsic,
    "mimir_fast.nhsic_grad.default": _nhsic_grad,
}


def scratch_of(func, batch: int, *args, **kwargs) -> Scratch:
    """Bytes that this operator, called like this, needs while it runs."""
    rule = SCRATCH.get(func) or SCRATCH.get(str(func))
    return rule(batch, *args, **kwargs) if rule else Scratch()


@contextlib.contextmanager
def autocast_like_cuda() -> Iterator[None]:
    """Inside, autocast on the CPU computes LayerNorm in fp32 from an fp32 copy of its input, as autocast on CUDA does."""

    def layer_norm(x, shape, weight=None, bias=None, eps=1e-5, cudnn_enable=True):
        with torch.autocast("cpu", enabled=False):
            return torch.layer_norm(x.float(), shape, weight, bias, eps, cudnn_enable)

    with torch.library._scoped_library("aten", "IMPL") as library:
        library.impl("layer_norm", layer_norm, "AutocastCPU")
        yield
