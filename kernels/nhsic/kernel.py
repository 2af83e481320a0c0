"""nhsic in Triton, for two Gaussian kernels.  Shapes: m samples, d numbers per sample, S parts of the reduction over d.

    rows --gram (split over d)--> S partial products --gaussian--> K - 1 --double_center--> H K H + cI
    --Cholesky (torch.linalg, on the device)--> P; value from both P.  Backward: P, K --> weights [m,m] --product--> d rows

Three choices keep fp32 exact enough (value 1e-6, gradient 1e-4 relative):
1.  K - 1 is stored instead of K: H 1 1^T H = 0, and near 1 it keeps the digits that K would lose.
2.  The constant vector, on which (H K H + cI)^-1 has the huge eigenvalue 1/c, is left out: with J = 1 1^T / m and the mean
    eigenvalue g = tr(H K H) / m, P = (H K H + cI + gJ)^-1 - J/(c+g), value = m - 1 - c tr P_x - c tr P_y + c^2 <P_x, P_y>
    and H (d value/d S) H = c P_x (I - c P_y) P_x.
3.  Products are `_matmul`, three tf32 products whatever torch.backends.cuda.matmul.allow_tf32 says: the gradient is a
    difference of large terms.
"""

from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from mimir_fast.kernels._shared.launch import FUSED, STORAGE, Launch, Prepared, empty, memoised
from mimir_fast.kernels._shared.registration import register
from mimir_fast.kernels.nhsic.gram import gaussian_gram, in_rows
from mimir_fast.kernels.nhsic.reference import RIDGE

MATMUL = {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 32, "num_warps": 4, "num_stages": 3}


@triton.jit
def _double_center_kernel(k, means, centred, m, ridge, BLOCK: tl.constexpr):
    """formula      centred = H k H + ridge I + g 1 1^T / m with g = -mean(k) = tr(H k H) / m, one row per program
    shapes       k [m,m] symmetric, means [m] of its rows -> centred [m,m]
    dtypes       fp32
    bytes        k once, means once per row (from cache), centred once
    determinism  fixed order
    source       docs/fidelity.md: the penalty
    """
    row = tl.program_id(0)
    column_N = tl.arange(0, BLOCK)
    mean_N = tl.load(means + column_N, mask=column_N < m, other=0)
    total = tl.sum(mean_N, axis=0) / m
    k_N = tl.load(k + row.to(tl.int64) * m + column_N, mask=column_N < m, other=0)
    centred_N = k_N - mean_N - (tl.load(means + row) - total) + (tl.where(column_N == row, ridge, 0.0) - total / m)
    tl.store(centred + row.to(tl.int64) * m + column_N, centred_N, mask=column_N < m)


@triton.jit
def _value_kernel(p_x, p_y, rows_value, m, c, BLOCK: tl.constexpr):
    """formula      rows_value[i] = 1 - 1/m - c Px_ii - c Py_ii + c^2 sum_j Px_ij Py_ij; their sum is the penalty
    shapes       p_x, p_y [m,m] -> rows_value [m]
    dtypes       fp32
    bytes        p_x and p_y once, rows_value once
    determinism  fixed order
    source       docs/fidelity.md: the penalty
    """
    row = tl.program_id(0)
    column_N = tl.arange(0, BLOCK)
    x_N = c * tl.load(p_x + row.to(tl.int64) * m + column_N, mask=column_N < m, other=0)
    y_N = c * tl.load(p_y + row.to(tl.int64) * m + column_N, mask=column_N < m, other=0)
    value_N = x_N * y_N - tl.where(column_N == row, x_N + y_N, 0.0)
    tl.store(rows_value + row, 1.0 - 1.0 / m + tl.sum(value_N, axis=0))


@triton.jit
def _weights_kernel(grad, a, k, weights, m, scale, BLOCK: tl.constexpr):
    """formula      Omega = -a * (1 + k) * scale; weights = 4 grad (diag(sum_j Omega_ij) - Omega), one row per program
    shapes       grad [], a = H (d value/d S) H / c and k [m,m] symmetric -> weights [m,m]
    dtypes       fp32
    bytes        a and k once, weights once
    determinism  fixed order
    source       docs/fidelity.md: the penalty
    """
    row = tl.program_id(0)
    column_N = tl.arange(0, BLOCK)
    a_N = tl.load(a + row.to(tl.int64) * m + column_N, mask=column_N < m, other=0)
    k_N = tl.load(k + row.to(tl.int64) * m + column_N, mask=column_N < m, other=0)
    # Omega's diagonal cancels in diag(sum_j Omega_ij) - Omega.
    omega_N = tl.where((column_N < m) & (column_N != row), -a_N * (1 + k_N) * scale, 0.0)
    laplacian_N = tl.where(column_N == row, tl.sum(omega_N, axis=0), -omega_N)
    weights_N = 4 * tl.load(grad).to(tl.float32) * laplacian_N
    tl.store(weights + row.to(tl.int64) * m + column_N, weights_N, mask=column_N < m)


@triton.jit
def _matmul_kernel(
    a, b, shift, out, m, n, stride_b, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr
):
    """formula      out = a (b - shift), shift None or subtracted from every row
    shapes       a [m,m], b [m,n] with row stride, shift [n] -> out [m,n]; a and out contiguous
    dtypes       fp32 as three tf32 products; b and out in any float dtype
    bytes        a once per column tile and b once per row tile (from L2), out once
    determinism  fixed order
    source       tiled matrix product
    """
    row_M = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    column_N = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    sum_MN = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, m, BLOCK_K):
        k_K = start + tl.arange(0, BLOCK_K)
        a_MK = a + row_M[:, None] * m + k_K[None, :]
        a_MK = tl.load(a_MK, mask=(row_M < m)[:, None] & (k_K < m)[None, :], other=0)
        b_KN = b + k_K.to(tl.int64)[:, None] * stride_b + column_N[None, :]
        b_KN = tl.load(b_KN, mask=(k_K < m)[:, None] & (column_N < n)[None, :], other=0).to(tl.float32)
        if shift is not None:
            b_KN -= tl.load(shift + column_N, mask=column_N < n, other=0)[None, :]
        sum_MN = tl.dot(a_MK, b_KN, sum_MN, input_precision="tf32x3")
    out_MN = out + row_M.to(tl.int64)[:, None] * n + column_N[None, :]
    tl.store(out_MN, sum_MN.to(out.dtype.element_ty), mask=(row_M < m)[:, None] & (column_N < n)[None, :])


def nhsic_forward(x_md: Tensor, y_me: Tensor, sigma: float) -> tuple[Tensor, ...]:
    """The value [], and of each side what the backward pass needs beside the rows: their shift, K - 1 and P."""
    (shift_x, kx, px), (shift_y, ky, py) = _ridge_inverse(x_md, sigma), _ridge_inverse(y_me, sigma)
    return _value(px, py), shift_x, kx, px, shift_y, ky, py


def nhsic_side_forward(y_me: Tensor, sigma: float) -> Tensor:
    """P [m,m] of samples without a gradient."""
    return _ridge_inverse(y_me, sigma)[2]


def nhsic_given_forward(x_md: Tensor, py: Tensor, sigma: float) -> tuple[Tensor, ...]:
    """As nhsic_forward with one side's P: the value [], shift, K - 1 and P of x."""
    shift_x, kx, px = _ridge_inverse(x_md, sigma)
    return _value(px, py), shift_x, kx, px


def _value(px: Tensor, py: Tensor) -> Tensor:
    (rows_value,) = _prepared_rows("value", len(px), RIDGE * len(px))(px, py)
    return rows_value.sum()


def _ridge_inverse(rows_md: Tensor, sigma: float) -> tuple[Tensor, Tensor, Tensor]:
    """The rows' shift, K - 1 and P; all of P is NaN where the factorisation fails."""
    shift_d, k_mm = gaussian_gram(rows_md, sigma)
    m = k_mm.shape[0]
    means_m = k_mm.mean(1)
    (ridged_mm,) = _prepared_rows("double_center", m, RIDGE * m)(k_mm, means_m)
    # cholesky_ex leaves its verdict on the device; torch.linalg.cholesky would wait for it.
    factor_mm, info = torch.linalg.cholesky_ex(ridged_mm)
    # The constant vector's part J / (c + g), with g = -mean(k), is subtracted: the second choice above.
    inverse_mm = torch.cholesky_inverse(factor_mm) - 1 / (m * (RIDGE * m - means_m.mean()))
    p_mm = torch.where(info == 0, inverse_mm, torch.nan)
    return shift_d, k_mm, p_mm.contiguous()


def nhsic_backward(
    grad: Tensor, rows_md: Tensor, shift_d: Tensor, k_mm: Tensor, p_self: Tensor, p_other: Tensor, sigma: float
) -> Tensor:
    """d value / d rows [m,d] times the upstream scalar: weights from P (I - c P_other) P, one product with shifted rows."""
    m, d = rows_md.shape
    r_other = torch.eye(m, dtype=p_other.dtype, device=p_other.device).sub_(p_other, alpha=RIDGE * m)
    a_mm = _matmul(_matmul(p_self, r_other), p_self)
    (weights_mm,) = _prepared_rows("weights", m, RIDGE * m / (2 * sigma**2 * d))(grad, a_mm, k_mm)
    # The weights' rows sum to zero, so that the shift makes rounding errors smaller and nothing else.
    return _matmul(weights_mm, in_rows(rows_md), shift_d)


def _matmul(a_mm: Tensor, b_mn: Tensor, shift_n: Tensor | None = None) -> Tensor:
    """a (b - shift), in b's dtype."""
    m, n = b_mn.shape
    (out_mn,) = _prepared_matmul(m, n, b_mn.stride(0), b_mn.dtype)(a_mm, b_mn, shift_n)
    return out_mn


@memoised
def _prepared_rows(what: str, m: int, number: float) -> Prepared:
    """A kernel with a program for every row of [m,m]; number: its ridge or scale."""
    kernel, shape = {
        "value": (_value_kernel, (m,)),
        "double_center": (_double_center_kernel, (m, m)),
        "weights": (_weights_kernel, (m, m)),
    }[what]
    options = {"BLOCK": triton.next_power_of_2(m), "num_warps": 4, **FUSED}
    return Prepared(kernel, (m,), m, number, results=[(shape, torch.float32)], **options)


@memoised
def _prepared_matmul(m: int, n: int, stride_b: int, dtype: torch.dtype) -> Prepared:
    grid = (triton.cdiv(n, MATMUL["BLOCK_N"]), triton.cdiv(m, MATMUL["BLOCK_M"]))
    return Prepared(_matmul_kernel, grid, m, n, stride_b, results=[((m, n), dtype)], **MATMUL, **FUSED)


def _fake_forward(x_md, y_me, sigma):
    m = x_md.shape[0]
    shapes = ((), x_md.shape[1:], (m, m), (m, m), y_me.shape[1:], (m, m), (m, m))
    return tuple(x_md.new_empty(shape, dtype=torch.float32) for shape in shapes)


def _save(ctx, inputs, output):
    x_md, y_me, ctx.sigma = inputs
    _, shift_x, kx, px, shift_y, ky, py = output
    # A side without a gradient needs its P alone.
    ctx.save_for_backward(*(x_md, shift_x, kx) if ctx.needs_input_grad[0] else (None, None, None), px,
                          *(y_me, shift_y, ky) if ctx.needs_input_grad[1] else (None, None, None), py)  # fmt: skip


def _backward(ctx, grad, *_):
    x_md, shift_x, kx, px, y_me, shift_y, ky, py = ctx.saved_tensors
    of_x = nhsic_grad(grad, x_md, shift_x, kx, px, py, ctx.sigma) if ctx.needs_input_grad[0] else None
    of_y = nhsic_grad(grad, y_me, shift_y, ky, py, px, ctx.sigma) if ctx.needs_input_grad[1] else None
    return of_x, of_y, None


def _save_given(ctx, inputs, output):
    x_md, py, ctx.sigma = inputs
    ctx.save_for_backward(x_md, *output[1:], py)


def _backward_given(ctx, grad, *_):
    return nhsic_grad(grad, *ctx.saved_tensors, ctx.sigma), None, None


nhsic = register(
    "nhsic",
    "(Tensor x, Tensor y, float sigma) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    nhsic_forward,
    _fake_forward,
    gradient=(_save, _backward),
)
nhsic_given = register(
    "nhsic_given",
    "(Tensor x, Tensor p_y, float sigma) -> (Tensor, Tensor, Tensor, Tensor)",
    nhsic_given_forward,
    lambda x, p_y, sigma: _fake_forward(x, x, sigma)[:4],
    gradient=(_save_given, _backward_given),
)
nhsic_side = register(
    "nhsic_side",
    "(Tensor y, float sigma) -> Tensor",
    nhsic_side_forward,
    lambda y, sigma: y.new_empty((len(y), len(y)), dtype=torch.float32),
)
nhsic_grad = register(
    "nhsic_grad",
    "(Tensor grad, Tensor rows, Tensor shift, Tensor k, Tensor p_self, Tensor p_other, float sigma) -> Tensor",
    nhsic_backward,
    lambda grad, rows, *_: rows.new_empty(rows.shape),
)


def launches() -> list[Launch]:
    # One stores one number per row, one a transposed tile, one a number per thread.
    narrow = frozenset(["_value_kernel", "_gaussian_kernel", "_shift_kernel"])
    # With fewer than 512 samples a row has less than 16 bytes per thread.
    short = narrow | {"_double_center_kernel", "_weights_kernel"}

    def call(m: int, d: int, dtype: torch.dtype):
        rows = empty(m, d, dtype=dtype)
        value, shift, k, p, _, _, p_other = nhsic_forward(rows, empty(m, d, dtype=dtype), 5.0)
        nhsic_backward(value, rows, shift, k, p, p_other, 5.0)

    return [
        Launch(f"m{m}", dtype, partial(call, m, 1024, d), short if m < 512 else narrow)
        for m in (128, 512, 2048, 8192)
        for dtype, d in STORAGE.items()
    ]
