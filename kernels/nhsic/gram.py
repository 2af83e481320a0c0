"""Gaussian kernel matrix in Triton: rows are multiplied with each other (split-K) and put into the exponential.

Distances do not change where the same row is subtracted from all, and rounding errors are those of short rows: the product
subtracts the mean of a few rows where it loads them, so that no centred rows are written.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from mimir_fast.kernels._shared.launch import FUSED, Prepared, memoised

# About four per multiprocessor on A100 and H100.  Not read from the device: results would depend on it.
PROGRAMS = 512
# Larger tiles spill registers on sm_80: three tf32 products split every operand in two.
GRAM = {"BLOCK_M": 64, "BLOCK_K": 16, "num_warps": 4, "num_stages": 3}
SHIFT = {"ROWS": 16, "BLOCK_D": 128, "num_warps": 4}
GAUSSIAN = {"BLOCK_M": 32, "num_warps": 4}


@triton.jit
def _shift_kernel(rows, shift, m, d, stride_m, ROWS: tl.constexpr, BLOCK_D: tl.constexpr):
    """formula      shift = mean of the first ROWS rows, or of all where there are fewer
    shapes       rows [m,d] with row stride -> shift [d]
    dtypes       any float storage; shift in fp32
    bytes        these rows once, shift once
    determinism  fixed order
    source       docs/fidelity.md: the penalty
    """
    column_D = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    row_M1 = tl.arange(0, ROWS)[:, None]
    exists_MD = (row_M1 < m) & (column_D < d)[None, :]
    rows_MD = tl.load(rows + row_M1.to(tl.int64) * stride_m + column_D[None, :], mask=exists_MD, other=0).to(tl.float32)
    tl.store(shift + column_D, tl.sum(rows_MD, axis=0) / tl.minimum(m, ROWS), mask=column_D < d)


@triton.jit
def _gram_kernel(rows, shift, partial, norms, m, d, stride_m, part, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr):
    """formula      partial[s,i,j] = sum over part s of d of (rows[i] - shift) (rows[j] - shift), tiles on and below the
                 diagonal only; norms[s,i] = partial[s,i,i]
    shapes       rows [m,d] with row stride, shift [d] -> partial [S,m,m], norms [S,m]
    dtypes       any float storage; fp32 as three tf32 products
    bytes        every row tile once per tile pair it is in (from L2), partial's lower half and norms once
    determinism  fixed order; the parts are summed by _gaussian_kernel
    source       split-K matrix product
    """
    i, j, s = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    # The product is symmetric: its upper half is written by _gaussian_kernel.
    if j > i:
        return
    row_M = i * BLOCK_M + tl.arange(0, BLOCK_M)
    column_M = j * BLOCK_M + tl.arange(0, BLOCK_M)
    left_M1 = rows + row_M.to(tl.int64)[:, None] * stride_m
    right_1M = rows + column_M.to(tl.int64)[None, :] * stride_m
    gram_MM = tl.zeros([BLOCK_M, BLOCK_M], tl.float32)
    for start in range(s * part, tl.minimum(s * part + part, d), BLOCK_K):
        k_K = start + tl.arange(0, BLOCK_K)
        left_MK = tl.load(left_M1 + k_K[None, :], mask=(row_M < m)[:, None] & (k_K < d)[None, :], other=0)
        right_KM = tl.load(right_1M + k_K[:, None], mask=(k_K < d)[:, None] & (column_M < m)[None, :], other=0)
        # Where there is no row, minus the shift: such products are not stored.
        shift_K = tl.load(shift + k_K, mask=k_K < d, other=0)
        left_MK, right_KM = left_MK.to(tl.float32) - shift_K[None, :], right_KM.to(tl.float32) - shift_K[:, None]
        gram_MM = tl.dot(left_MK, right_KM, gram_MM, input_precision="tf32x3")
    partial_MM = partial + (s.to(tl.int64) * m + row_M[:, None]) * m + column_M[None, :]
    tl.store(partial_MM, gram_MM, mask=(row_M < m)[:, None] & (column_M < m)[None, :])
    if i == j:
        norm_M = tl.sum(tl.where(row_M[:, None] == column_M[None, :], gram_MM, 0.0), axis=1)
        tl.store(norms + s.to(tl.int64) * m + row_M, norm_M, mask=row_M < m)


@triton.jit
def _gaussian_kernel(partial, norms, k, m, S, scale, BLOCK_M: tl.constexpr):
    """formula      G = sum_s partial[s]; k_ij = exp(-scale (G_ii + G_jj - 2 G_ij)) - 1
    shapes       partial [S,m,m] (lower half), norms [S,m] its diagonals -> k [m,m], both halves
    dtypes       fp32
    bytes        partial's lower half once, norms twice per tile (from L2), k once
    determinism  fixed order; k is exactly symmetric with an exactly zero diagonal
    source       Ma et al., The HSIC Bottleneck, 2020, equation 4
    """
    if tl.program_id(1) > tl.program_id(0):
        return
    row_M = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    column_M = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    exists_MM = (row_M < m)[:, None] & (column_M < m)[None, :]
    gram_MM = tl.zeros([BLOCK_M, BLOCK_M], tl.float32)
    row_norm_M = tl.zeros([BLOCK_M], tl.float32)
    column_norm_M = tl.zeros([BLOCK_M], tl.float32)
    for _ in range(S):
        gram_MM += tl.load(partial + row_M[:, None] * m + column_M[None, :], mask=exists_MM, other=0)
        row_norm_M += tl.load(norms + row_M, mask=row_M < m, other=0)
        column_norm_M += tl.load(norms + column_M, mask=column_M < m, other=0)
        partial += m * m
        norms += m
    distance_MM = row_norm_M[:, None] + column_norm_M[None, :] - 2 * gram_MM
    # Rounding can make a distance negative.  tl.where keeps a NaN, which tl.maximum would turn into 0.
    k_MM = _expm1(-scale * tl.where(distance_MM < 0, 0.0, distance_MM))
    tl.store(k + row_M[:, None] * m + column_M[None, :], k_MM, mask=exists_MM & (column_M[None, :] <= row_M[:, None]))
    tl.store(k + column_M[None, :] * m + row_M[:, None], k_MM, mask=exists_MM & (column_M[None, :] < row_M[:, None]))


@triton.jit
def _expm1(x):
    """exp(x) - 1 for x <= 0, by its Taylor series near 0, where the difference would cancel."""
    # Seven terms: the eighth is at most 5e-8 of the result, less than fp32 resolves.
    series = 1 + x / 5 * (1 + x / 6 * (1 + x / 7))
    series = x * (1 + x / 2 * (1 + x / 3 * (1 + x / 4 * series)))
    return tl.where(x > -0.4, series, tl.exp(x) - 1)


def gaussian_gram(rows_md: Tensor, sigma: float) -> tuple[Tensor, Tensor]:
    """What was subtracted from the rows [d] and their Gaussian kernel minus one [m,m], both fp32."""
    m, d = rows_md.shape
    rows_md = in_rows(rows_md)
    shift, gram, gaussian = _prepared(m, d, rows_md.stride(0), sigma)
    (shift_d,) = shift(rows_md)
    (k_mm,) = gaussian(*gram(rows_md, shift_d))
    return shift_d, k_mm


def in_rows(rows_md: Tensor) -> Tensor:
    """Rows whose numbers are neighbours; they may lie apart: a slice of wider ones is not copied."""
    return rows_md if rows_md.stride(1) == 1 else rows_md.contiguous()


@memoised
def _prepared(m: int, d: int, stride_m: int, sigma: float) -> tuple[Prepared, Prepared, Prepared]:
    parts, part = _split(m, d)
    tiles, larger = triton.cdiv(m, GAUSSIAN["BLOCK_M"]), triton.cdiv(m, GRAM["BLOCK_M"])
    grid, scale = (triton.cdiv(d, SHIFT["BLOCK_D"]),), 1 / (2 * sigma**2 * d)
    products = [((parts, m, m), torch.float32), ((parts, m), torch.float32)]
    square, numbers = [((m, m), torch.float32)], (m, d, stride_m)
    return (
        Prepared(_shift_kernel, grid, *numbers, results=[((d,), torch.float32)], **SHIFT, **FUSED),
        Prepared(_gram_kernel, (larger, larger, parts), *numbers, part, results=products, **GRAM, **FUSED),
        Prepared(_gaussian_kernel, (tiles, tiles), m, parts, scale, results=square, **GAUSSIAN, **FUSED),
    )


def _split(m: int, d: int) -> tuple[int, int]:
    """How many parts the Gram product's reduction over d is split into, and how long a part is."""
    tiles = triton.cdiv(m, GRAM["BLOCK_M"])
    # Tiles above the diagonal do no work and do not count.  A part has 8 blocks of d or so: shorter ones would write
    # partial products for little arithmetic.
    parts = min(triton.cdiv(PROGRAMS, tiles * (tiles + 1) // 2), triton.cdiv(d, 8 * GRAM["BLOCK_K"]))
    part = triton.cdiv(triton.cdiv(d, parts), GRAM["BLOCK_K"]) * GRAM["BLOCK_K"]
    return triton.cdiv(d, part), part
