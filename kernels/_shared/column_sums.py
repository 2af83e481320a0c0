"""Column sums, second stage: adds partial sums, one per group of rows, in a fixed order.  No operation of its own.

Shapes: K sums at once, G groups of rows, D columns, [ROWS, COLUMNS] a tile.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from mimir_fast.kernels._shared.launch import FUSED, Prepared, memoised

TILE = {"ROWS": 128, "COLUMNS": 32, "num_warps": 8}
# The results are three separate pointers of the kernel: add_layer_norm sums for weight, bias and delta_bias.
SUMS = 3


@triton.jit
def _add_partials_kernel(partials, first, second, third, G, D, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """formula      first, second, third (None where K is smaller) = the partials' sums over the groups
    shapes       partials [K,G,D] -> [D] each
    dtypes       fp32 sums, any float storage of the results
    bytes        the partials once, the results once
    determinism  fixed order
    source       second stage of the kernel that wrote the partials
    """
    column_1C = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    which = tl.program_id(1)
    sum_RC = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(0, G, ROWS):
        group_R1 = start + tl.arange(0, ROWS)[:, None]
        partial_RC = partials + (which * G + group_R1).to(tl.int64) * D + column_1C
        sum_RC += tl.load(partial_RC, mask=(group_R1 < G) & (column_1C < D), other=0)
    sum_1C = tl.sum(sum_RC, axis=0, keep_dims=True)
    exists_1C = column_1C < D
    # Triton cannot index a list of pointers: every program names all three, and stores to one of them.
    tl.store(first + column_1C, sum_1C.to(first.dtype.element_ty), mask=exists_1C & (which == 0))
    if second is not None:
        tl.store(second + column_1C, sum_1C.to(second.dtype.element_ty), mask=exists_1C & (which == 1))
    if third is not None:
        tl.store(third + column_1C, sum_1C.to(third.dtype.element_ty), mask=exists_1C & (which == 2))


def add_partials(partials_KGD: Tensor, dtypes: tuple[torch.dtype, ...]) -> list[Tensor]:
    """Each of the K partials summed over the groups, [D] in its dtype; K is 1, 2 or 3."""
    return prepared_sums(partials_KGD.shape, dtypes)(partials_KGD)[: len(dtypes)]


@memoised
def prepared_sums(shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...]) -> Prepared:
    """The launch of `add_partials`; of its three results those past K are None."""
    K, G, D = shape
    results = [((D,), dtype) for dtype in dtypes] + [None] * (SUMS - K)
    grid = (triton.cdiv(D, TILE["COLUMNS"]), K)
    return Prepared(_add_partials_kernel, grid, G, D, results=results, **TILE, **FUSED)
