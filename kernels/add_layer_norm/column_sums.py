"""The second stage of add_layer_norm's column sums.  Shapes: D width, G groups of rows, K sums, C columns of a tile."""

import triton
import triton.language as tl
from torch import Tensor

TILE = {"ROWS": 128, "COLUMNS": 32, "num_warps": 8}


@triton.jit
def _add_partials_kernel(
    partials, d_weight, d_bias, d_delta_bias, G, D: tl.constexpr, OF_NORM: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    """formula      d_weight, d_bias, d_delta_bias = the partials' sums over the groups
    shapes       partials [K,G,D], of weight and bias (if OF_NORM), then of delta_bias (if K says so) -> [D] each
    dtypes       fp32 sums, any float storage of the results
    bytes        the partials once, the results once
    determinism  fixed order
    source       second stage of _add_norm_grad_kernel
    """
    column_1C = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    which = tl.program_id(1)
    sum_RC = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(0, G, ROWS):
        group_R1 = start + tl.arange(0, ROWS)[:, None]
        partial_RC = partials + (which * G + group_R1) * D + column_1C
        sum_RC += tl.load(partial_RC, mask=(group_R1 < G) & (column_1C < D), other=0)
    sum_1C = tl.sum(sum_RC, axis=0, keep_dims=True)
    if OF_NORM:
        if which == 0:
            tl.store(d_weight + column_1C, sum_1C.to(d_weight.dtype.element_ty), mask=column_1C < D)
        if which == 1:
            tl.store(d_bias + column_1C, sum_1C.to(d_bias.dtype.element_ty), mask=column_1C < D)
    if which == (2 if OF_NORM else 0):
        tl.store(d_delta_bias + column_1C, sum_1C.to(d_delta_bias.dtype.element_ty), mask=column_1C < D)


def add_partials(partials_KGD: Tensor, d_weight: Tensor, d_bias: Tensor, d_delta_bias: Tensor, of_norm: bool) -> None:
    """Sum over the groups into [D] each; without of_norm the partials are delta_bias's alone."""
    K, G, D = partials_KGD.shape
    grid = triton.cdiv(D, TILE["COLUMNS"]), K
    _add_partials_kernel[grid](partials_KGD, d_weight, d_bias, d_delta_bias, G, D=D, OF_NORM=of_norm, **TILE)
