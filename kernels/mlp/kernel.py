"""mlp in Triton: two of its six matrix products, with GELU on their tiles in registers, and the autograd of all six.

Shapes: M rows, D width, F hidden width, T tiles of rows.  Columns are whole tiles (op.supported), so that none is masked.
GELU is applied to a quarter of a tile's columns at a time, so that its intermediate values take few registers.
"""

from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from mimir_fast.kernels._shared.column_sums import add_partials
from mimir_fast.kernels._shared.generation import generation_of
from mimir_fast.kernels._shared.launch import FUSED, STORAGE, Launch, Prepared, empty, memoised, nothing
from mimir_fast.kernels._shared.registration import register
from mimir_fast.kernels._shared.tiles import chosen
from mimir_fast.kernels.mlp.gelu import gelu, gelu_slope
from mimir_fast.kernels.mlp.tiles import SIZES

# Tiles of rows whose programs run together, so that they find the same weights in the L2 cache.
GROUP = 8
# Sizes with which two programs fit on a multiprocessor: one computes GELU and writes while the other multiplies.
AMPERE = {"BLOCK_M": 128, "BLOCK_F": 128, "BLOCK_K": 32, "num_warps": 4, "num_stages": 4}
HOPPER = {"BLOCK_M": 128, "BLOCK_F": 128, "BLOCK_K": 64, "num_warps": 4, "num_stages": 3}


@triton.jit
def _tile(M, F, BLOCK_M: tl.constexpr, BLOCK_F: tl.constexpr, GROUP: tl.constexpr):
    """This program's tile of rows, those rows [BLOCK_M] (int64), and its first column."""
    across = tl.cdiv(F, BLOCK_F)
    first = tl.program_id(0) // (GROUP * across) * GROUP
    group = tl.minimum(tl.cdiv(M, BLOCK_M) - first, GROUP)
    place = tl.program_id(0) % (GROUP * across)
    tile = first + place % group
    return tile, tile.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M), place // group * BLOCK_F


@triton.jit
def _product(
    left, right, row_M, first, M, D, stride_k, stride_f, BLOCK_F: tl.constexpr, BLOCK_K: tl.constexpr
):  # fmt: skip
    """A tile of left [M,D] right [D,F] in fp32; right has strides.  Rows past the end repeat the last one."""
    column_F = first + tl.arange(0, BLOCK_F)
    k_K = tl.arange(0, BLOCK_K)
    # Clamped, not masked: results of rows past the end are not stored, and the loop needs no mask.
    left_MK = left + tl.minimum(row_M, M - 1)[:, None] * D + k_K[None, :]
    right_KF = right + k_K[:, None].to(tl.int64) * stride_k + column_F[None, :].to(tl.int64) * stride_f
    sum_MF = tl.zeros([row_M.shape[0], BLOCK_F], tl.float32)
    for _ in range(0, D, BLOCK_K):
        sum_MF = tl.dot(tl.load(left_MK), tl.load(right_KF), sum_MF)
        left_MK += BLOCK_K
        right_KF += BLOCK_K * stride_k
    return sum_MF


@triton.jit
def _halves(tile_MF):
    """Left and right half of a tile's columns."""
    # Tensors cannot be sliced in Triton; tl.split takes a last dimension of 2.
    M: tl.constexpr = tile_MF.shape[0]
    half: tl.constexpr = tile_MF.shape[1] // 2
    return tl.split(tl.permute(tl.reshape(tile_MF, [M, 2, half]), (0, 2, 1)))


@triton.jit
def _quarters(tile_MF):
    """A tile's columns in four parts, from left to right."""
    left, right = _halves(tile_MF)
    a, b = _halves(left)
    c, d = _halves(right)
    return a, b, c, d


@triton.jit
def _linear_gelu_kernel(
    x, weight, bias, act, pre, M, F, D,
    BLOCK_M: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """formula      pre = x weight^T + bias, act = gelu(pre)
    shapes       x [M,D], weight [F,D], bias [F] -> act, pre [M,F], all contiguous
    dtypes       16-bit storage, fp32 sums; GELU of pre as stored
    bytes        x once per column tile and weight once per row tile (from L2), act and pre once
    determinism  fixed order
    source       Hendrycks and Gimpel, Gaussian Error Linear Units, 2016
    """
    _, row_M, first = _tile(M, F, BLOCK_M, BLOCK_F, GROUP)
    parts = _quarters(_product(x, weight, row_M, first, M, D, 1, D, BLOCK_F, BLOCK_K))
    for i in tl.static_range(4):
        column_1C = (first + i * (BLOCK_F // 4) + tl.arange(0, BLOCK_F // 4))[None, :]
        bias_1C = tl.load(bias + column_1C).to(tl.float32)
        pre_MC = (parts[i] + bias_1C).to(pre.dtype.element_ty)
        tl.store(pre + row_M[:, None] * F + column_1C, pre_MC, mask=row_M[:, None] < M)
        # GELU of pre as stored: the backward pass reads that, and its gradient must belong to the same function.
        h_MC = pre_MC.to(tl.float32)
        tl.store(act + row_M[:, None] * F + column_1C, gelu(h_MC).to(act.dtype.element_ty), mask=row_M[:, None] < M)


@triton.jit
def _gelu_linear_grad_kernel(
    grad, weight, pre, grad_pre, sums, M, F, D,
    BLOCK_M: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """formula      grad_pre = (grad weight) gelu'(pre); sums[t] = sum of grad_pre over the rows of tile t, if asked for
    shapes       grad [M,D], weight [D,F], pre [M,F] -> grad_pre [M,F], sums [T,F], all contiguous
    dtypes       16-bit storage, fp32 sums of numbers before they are rounded
    bytes        grad once per column tile and weight once per row tile (from L2), pre, grad_pre and sums once
    determinism  fixed order
    source       derivative of _linear_gelu_kernel
    """
    tile, row_M, first = _tile(M, F, BLOCK_M, BLOCK_F, GROUP)
    parts = _quarters(_product(grad, weight, row_M, first, M, D, F, 1, BLOCK_F, BLOCK_K))
    for i in tl.static_range(4):
        column_1C = (first + i * (BLOCK_F // 4) + tl.arange(0, BLOCK_F // 4))[None, :]
        h_MC = tl.load(pre + row_M[:, None] * F + column_1C, mask=row_M[:, None] < M, other=0).to(tl.float32)
        grad_MC = parts[i] * gelu_slope(h_MC)
        tl.store(
            grad_pre + row_M[:, None] * F + column_1C, grad_MC.to(grad_pre.dtype.element_ty), mask=row_M[:, None] < M
        )
        if sums is not None:
            # Repeats of the last row, past the end, must not be added.
            sum_1C = tl.sum(tl.where(row_M[:, None] < M, grad_MC, 0.0), axis=0, keep_dims=True)
            tl.store(sums + tile.to(tl.int64) * F + column_1C, sum_1C)


def linear_gelu_forward(x_MD: Tensor, weight_FD: Tensor, bias_F: Tensor, config: dict | None = None) -> tuple:
    """gelu(pre) and pre = x weight^T + bias, both [M,F]."""
    (M, D), F, dtype = x_MD.shape, weight_FD.shape[0], x_MD.dtype
    config = config or chosen("_linear_gelu_kernel", D, F, dtype) or _config(x_MD.device)
    launch = _prepared_forward(M, F, D, dtype, *config.values())
    act_MF, pre_MF = launch(x_MD.contiguous(), weight_FD.contiguous(), bias_F.contiguous())
    return act_MF, pre_MF


def gelu_linear_backward(
    grad_MD: Tensor, weight_DF: Tensor, pre_MF: Tensor, with_sums: bool, config: dict | None = None
) -> tuple[Tensor, Tensor]:
    """Gradient in pre [M,F], and its sum over the rows [F], empty unless with_sums."""
    (M, F), D, dtype = pre_MF.shape, grad_MD.shape[1], pre_MF.dtype
    config = config or chosen("_gelu_linear_grad_kernel", D, F, dtype) or _config(grad_MD.device)
    launch = _prepared_backward(M, F, D, dtype, with_sums, *config.values())
    grad_pre_MF, sums_1TF = launch(grad_MD.contiguous(), weight_DF.contiguous(), pre_MF.contiguous())
    return grad_pre_MF, add_partials(sums_1TF, (pre_MF.dtype,))[0] if with_sums else nothing(pre_MF)


@memoised
def _prepared_forward(M: int, F: int, D: int, dtype: torch.dtype, *sizes: int) -> Prepared:
    """sizes: the values of AMPERE or HOPPER."""
    # Numbers and not the dictionary, which could not be hashed; AMPERE has the same keys in the same order.
    config, results = dict(zip(HOPPER, sizes)), [((M, F), dtype)] * 2
    return Prepared(_linear_gelu_kernel, _grid(M, F, config), M, F, D, results=results, GROUP=GROUP, **config, **FUSED)


@memoised
def _prepared_backward(M: int, F: int, D: int, dtype: torch.dtype, with_sums: bool, *sizes: int) -> Prepared:
    config = dict(zip(HOPPER, sizes))
    # The leading 1 is K of column_sums.py: one sum at once.
    sums = ((1, triton.cdiv(M, config["BLOCK_M"]), F), torch.float32) if with_sums else None
    numbers, options = (M, F, D), {"GROUP": GROUP, **config, **FUSED}
    return Prepared(_gelu_linear_grad_kernel, _grid(M, F, config), *numbers, results=[((M, F), dtype), sums], **options)


def _grid(M: int, F: int, config: dict) -> tuple[int]:
    return (triton.cdiv(M, config["BLOCK_M"]) * triton.cdiv(F, config["BLOCK_F"]),)


def _config(device: torch.device) -> dict:
    """Tile sizes for this GPU."""
    return HOPPER if generation_of(device) >= 9 else AMPERE


def _fake_forward(x_MD, weight_FD, bias_F):
    return tuple(x_MD.new_empty((x_MD.shape[0], weight_FD.shape[0])) for _ in range(2))


def _fake_backward(grad_MD, weight_DF, pre_MF, with_sums):
    return pre_MF.new_empty(pre_MF.shape), pre_MF.new_empty(pre_MF.shape[1] if with_sums else 0)


linear_gelu = register(
    "linear_gelu", "(Tensor x, Tensor weight, Tensor bias) -> (Tensor, Tensor)", linear_gelu_forward, _fake_forward
)
gelu_linear_grad = register(
    "gelu_linear_grad",
    "(Tensor grad, Tensor weight, Tensor pre, bool with_sums) -> (Tensor, Tensor)",
    gelu_linear_backward,
    _fake_backward,
)


class MLP(torch.autograd.Function):
    """x [...,D], weight1 [F,D], bias1 [F], weight2 [D,F] -> [...,D]; computes only the gradients that are needed."""

    @staticmethod
    def forward(ctx, x: Tensor, weight1_FD: Tensor, bias1_F: Tensor, weight2_DF: Tensor) -> Tensor:
        x_MD = x.reshape(-1, x.shape[-1])
        act_MF, pre_MF = linear_gelu(x_MD, weight1_FD, bias1_F)
        # act could be computed again from pre; kept, it makes weight2's gradient a single product.
        ctx.save_for_backward(x_MD, weight1_FD, weight2_DF, act_MF, pre_MF)
        return (act_MF @ weight2_DF.T).view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        x_MD, weight1_FD, weight2_DF, act_MF, pre_MF = ctx.saved_tensors
        of_x, of_weight1, of_bias1, of_weight2 = ctx.needs_input_grad
        grad_MD = grad.reshape(x_MD.shape)
        grad_pre_MF, bias_F = gelu_linear_grad(grad_MD, weight2_DF, pre_MF, of_bias1)
        return (
            (grad_pre_MF @ weight1_FD).view(grad.shape) if of_x else None,
            grad_pre_MF.T @ x_MD if of_weight1 else None,
            bias_F if of_bias1 else None,
            grad_MD.T @ act_MF if of_weight2 else None,
        )


def launches() -> list[Launch]:
    def call(D: int, F: int, dtype: torch.dtype, config: dict):
        x_MD, weight1_FD, weight2_DF = empty(512, D, dtype=dtype), empty(F, D, dtype=dtype), empty(D, F, dtype=dtype)
        _, pre_MF = linear_gelu_forward(x_MD, weight1_FD, empty(F, dtype=dtype), config)
        for with_sums in (True, False):
            gelu_linear_backward(x_MD, weight2_DF, pre_MF, with_sums, config)

    # It writes 32 numbers per program.
    narrow = frozenset(["_add_partials_kernel"])
    own = [
        Launch(f"D{D} F{4 * D}", kind, partial(call, D, 4 * D, STORAGE[kind], config), narrow, archs)
        for archs, config in (((80,), AMPERE), ((90,), HOPPER))
        for D, kind in ((768, "bf16"), (768, "fp16"), (192, "bf16"))
    ]
    # In fp16 alone, which only the recorded table has: compiling takes long.
    return own + [
        Launch(
            f"D768 F3072 {name}", "fp16", partial(call, 768, 3072, STORAGE["fp16"], config), narrow, (10 * generation,)
        )
        for generation, named in SIZES.items()
        for name, config in named.items()
    ]
