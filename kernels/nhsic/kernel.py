"""nhsic in Triton, for two Gaussian kernels.  Shapes: m samples, d numbers per sample, S parts of the reduction over d.

    rows --center--> centred --gram (split over d)--> S partial products --gaussian--> K - 1 --double_center--> H K H + cI
    --Cholesky (torch.linalg, on the device)--> P; value from both P.  Backward: P, K --> weights [m,m] --product--> d rows

Three choices keep fp32 exact enough (value 1e-6, gradient 1e-4 relative):
K - 1 stands in for K, since H 1 1^T H = 0 and near 1 it keeps the digits that K would lose;
the constant vector, on which (H K H + cI)^-1 has the huge eigenvalue 1/c, is left out: with J = 1 1^T / m and the mean
eigenvalue g = tr(H K H) / m, P = (H K H + cI + gJ)^-1 - J/(c+g), value = m - 1 - c tr P_x - c tr P_y + c^2 <P_x, P_y> and
H (d value/d S) H = c P_x (I - c P_y) P_x;
products are `_matmul`, three tf32 products whatever torch.backends.cuda.matmul.allow_tf32 says, for the gradient is a
difference of large terms.
"""

import torch
import triton
import triton.language as tl
from mimir_fast.kernels.launch import STORAGE, Launch, empty
from mimir_fast.kernels.nhsic.reference import RIDGE
from mimir_fast.kernels.registration import register
from torch import Tensor

PROGRAMS = 512  # about four per SM on A100 and H100; a constant, so that results do not depend on the device
GRAM = {
    "BLOCK_M": 64,
    "BLOCK_K": 16,
    "num_warps": 4,
    "num_stages": 3,
}  # larger tiles spill on sm_80: 3 x tf32 splits operands
MATMUL = {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 32, "num_warps": 4, "num_stages": 3}
CENTER = {"BLOCK_M": 32, "BLOCK_D": 128, "num_warps": 4}
GAUSSIAN = {"BLOCK_M": 32, "num_warps": 4}


@triton.jit
def _center_kernel(rows, centred, m, d, stride_m, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr):
    """formula      centred = rows - mean over m
    shapes       rows [m,d] with row stride, centred [m,d]
    dtypes       any float storage, fp32 accumulation; centred in fp32, for rounding it to 16 bits would show in the gradient
    bytes        rows twice (the second time from cache: a program's columns are small), centred once
    determinism  fixed order
    source       docs/fidelity.md: the penalty
    """
    column_D = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)[None, :]
    sum_MD = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for start in range(0, m, BLOCK_M):
        row_M = (start + tl.arange(0, BLOCK_M)[:, None]).to(tl.int64)
        sum_MD += tl.load(rows + row_M * stride_m + column_D, mask=(row_M < m) & (column_D < d), other=0).to(tl.float32)
    mean_D = tl.sum(sum_MD, axis=0, keep_dims=True) / m
    for start in range(0, m, BLOCK_M):
        row_M = (start + tl.arange(0, BLOCK_M)[:, None]).to(tl.int64)
        exists_MD = (row_M < m) & (column_D < d)
        rows_MD = tl.load(rows + row_M * stride_m + column_D, mask=exists_MD, other=0).to(tl.float32)
        tl.store(centred + row_M * d + column_D, rows_MD - mean_D, mask=exists_MD)


@triton.jit
def _gram_kernel(centred, partial, m, d, part, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr):
    """formula      partial[s,i,j] = sum over part s of d of centred[i] centred[j], tiles on and below the diagonal only
    shapes       centred [m,d] -> partial [S,m,m]
    dtypes       fp32, as three tf32 products
    bytes        every row tile once per tile pair it is in (from L2), partial's lower half once
    determinism  fixed order; the parts are summed by _gaussian_kernel
    source       split-K matrix product
    """
    i, j, s = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    if j > i:
        return
    row_M = i * BLOCK_M + tl.arange(0, BLOCK_M)
    column_M = j * BLOCK_M + tl.arange(0, BLOCK_M)
    left_M1 = centred + row_M.to(tl.int64)[:, None] * d
    right_1M = centred + column_M.to(tl.int64)[None, :] * d
    gram_MM = tl.zeros([BLOCK_M, BLOCK_M], tl.float32)
    for start in range(s * part, tl.minimum(s * part + part, d), BLOCK_K):
        k_K = start + tl.arange(0, BLOCK_K)
        left_MK = tl.load(left_M1 + k_K[None, :], mask=(row_M < m)[:, None] & (k_K < d)[None, :], other=0)
        right_KM = tl.load(right_1M + k_K[:, None], mask=(k_K < d)[:, None] & (column_M < m)[None, :], other=0)
        gram_MM = tl.dot(left_MK, right_KM, gram_MM, input_precision="tf32x3")
    partial_MM = partial + (s.to(tl.int64) * m + row_M[:, None]) * m + column_M[None, :]
    tl.store(partial_MM, gram_MM, mask=(row_M < m)[:, None] & (column_M < m)[None, :])


@triton.jit
def _gaussian_kernel(partial, k, m, S, scale, BLOCK_M: tl.constexpr):
    """formula      G = sum_s partial[s]; k_ij = exp(-scale (G_ii + G_jj - 2 G_ij)) - 1
    shapes       partial [S,m,m] (lower half) -> k [m,m], both halves
    dtypes       fp32
    bytes        partial's lower half once and its diagonal once per tile, k once
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
        row_norm_M += tl.load(partial + row_M * (m + 1), mask=row_M < m, other=0)
        column_norm_M += tl.load(partial + column_M * (m + 1), mask=column_M < m, other=0)
        partial += m * m
    distance_MM = row_norm_M[:, None] + column_norm_M[None, :] - 2 * gram_MM
    k_MM = _expm1(-scale * tl.where(distance_MM < 0, 0.0, distance_MM))  # keeps NaN, as tl.maximum would not
    tl.store(k + row_M[:, None] * m + column_M[None, :], k_MM, mask=exists_MM & (column_M[None, :] <= row_M[:, None]))
    tl.store(k + column_M[None, :] * m + row_M[:, None], k_MM, mask=exists_MM & (column_M[None, :] < row_M[:, None]))


@triton.jit
def _expm1(x):
    """exp(x) - 1 for x <= 0: Taylor's series where the difference would cancel."""
    series = 1 + x / 5 * (1 + x / 6 * (1 + x / 7))
    series = x * (1 + x / 2 * (1 + x / 3 * (1 + x / 4 * series)))
    return tl.where(x > -0.4, series, tl.exp(x) - 1)


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
    omega_N = tl.where((column_N < m) & (column_N != row), -a_N * (1 + k_N) * scale, 0.0)  # the diagonal cancels
    laplacian_N = tl.where(column_N == row, tl.sum(omega_N, axis=0), -omega_N)
    weights_N = 4 * tl.load(grad).to(tl.float32) * laplacian_N
    tl.store(weights + row.to(tl.int64) * m + column_N, weights_N, mask=column_N < m)


@triton.jit
def _matmul_kernel(a, b, out, m, n, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """formula      out = a b
    shapes       a [m,m], b [m,n] -> out [m,n], all contiguous
    dtypes       fp32, as three tf32 products; out in any float dtype
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
        b_KN = b + k_K.to(tl.int64)[:, None] * n + column_N[None, :]
        b_KN = tl.load(b_KN, mask=(k_K < m)[:, None] & (column_N < n)[None, :], other=0)
        sum_MN = tl.dot(a_MK, b_KN, sum_MN, input_precision="tf32x3")
    out_MN = out + row_M.to(tl.int64)[:, None] * n + column_N[None, :]
    tl.store(out_MN, sum_MN.to(out.dtype.element_ty), mask=(row_M < m)[:, None] & (column_N < n)[None, :])


def nhsic_forward(x_md: Tensor, y_me: Tensor, sigma: float) -> tuple[Tensor, ...]:
    """value [], and what the backward needs of each side: centred rows, K - 1 and P."""
    m = x_md.shape[0]
    (x_md, kx, px), (y_me, ky, py) = _ridge_inverse(x_md, sigma), _ridge_inverse(y_me, sigma)
    rows_value = px.new_empty(m)
    _value_kernel[(m,)](px, py, rows_value, m, RIDGE * m, BLOCK=triton.next_power_of_2(m), num_warps=4)
    return rows_value.sum(), x_md, kx, px, y_me, ky, py


def gaussian_gram(rows_md: Tensor, sigma: float) -> tuple[Tensor, Tensor]:
    """Centred rows [m,d] and their Gaussian kernel minus one [m,m], both fp32."""
    m, d = rows_md.shape
    rows_md = rows_md if rows_md.stride(1) == 1 else rows_md.contiguous()
    parts, part = _split(m, d)
    centred_md, partial_Smm, k_mm = (
        rows_md.new_empty(shape, dtype=torch.float32) for shape in ((m, d), (parts, m, m), (m, m))
    )
    _center_kernel[(triton.cdiv(d, CENTER["BLOCK_D"]),)](rows_md, centred_md, m, d, rows_md.stride(0), **CENTER)
    tiles = triton.cdiv(m, GRAM["BLOCK_M"])
    _gram_kernel[(tiles, tiles, parts)](centred_md, partial_Smm, m, d, part, **GRAM)
    tiles = triton.cdiv(m, GAUSSIAN["BLOCK_M"])
    _gaussian_kernel[(tiles, tiles)](partial_Smm, k_mm, m, parts, 1 / (2 * sigma**2 * d), **GAUSSIAN)
    return centred_md, k_mm


def _split(m: int, d: int) -> tuple[int, int]:
    """How many parts the Gram product's reduction over d is split into, and how long a part is."""
    tiles = triton.cdiv(m, GRAM["BLOCK_M"])
    parts = min(triton.cdiv(PROGRAMS, tiles * (tiles + 1) // 2), triton.cdiv(d, 8 * GRAM["BLOCK_K"]))
    part = triton.cdiv(triton.cdiv(d, parts), GRAM["BLOCK_K"]) * GRAM["BLOCK_K"]
    return triton.cdiv(d, part), part


def _ridge_inverse(rows_md: Tensor, sigma: float) -> tuple[Tensor, Tensor, Tensor]:
    """Centred rows, K - 1 and P, which is NaN throughout where the factorisation fails."""
    centred_md, k_mm = gaussian_gram(rows_md, sigma)
    m = k_mm.shape[0]
    ridged_mm, means_m = torch.empty_like(k_mm), k_mm.mean(1)
    block = triton.next_power_of_2(m)
    _double_center_kernel[(m,)](k_mm, means_m, ridged_mm, m, RIDGE * m, BLOCK=block, num_warps=4)
    factor_mm, info = torch.linalg.cholesky_ex(ridged_mm)
    inverse_mm = torch.cholesky_inverse(factor_mm) - 1 / (m * (RIDGE * m - means_m.mean()))
    p_mm = torch.where(info == 0, inverse_mm, torch.nan)
    return centred_md, k_mm, p_mm.contiguous()


def nhsic_backward(
    grad: Tensor, rows_md: Tensor, k_mm: Tensor, p_self: Tensor, p_other: Tensor, sigma: float, dtype: torch.dtype
) -> Tensor:
    """d value / d rows [m,d] times the upstream scalar: weights from P (I - c P_other) P, one product with centred rows."""
    m, d = rows_md.shape
    r_other = torch.eye(m, dtype=p_other.dtype, device=p_other.device).sub_(p_other, alpha=RIDGE * m)
    a_mm = _matmul(_matmul(p_self, r_other, torch.float32), p_self, torch.float32)
    weights_mm = torch.empty_like(k_mm)
    scale = RIDGE * m / (2 * sigma**2 * d)
    block = triton.next_power_of_2(m)
    _weights_kernel[(m,)](grad, a_mm, k_mm, weights_mm, m, scale, BLOCK=block, num_warps=4)
    return _matmul(weights_mm, rows_md, dtype)


def _matmul(a_mm: Tensor, b_mn: Tensor, dtype: torch.dtype) -> Tensor:
    m, n = b_mn.shape
    a_mm, out_mn = a_mm.contiguous(), b_mn.new_empty((m, n), dtype=dtype)
    grid = (triton.cdiv(n, MATMUL["BLOCK_N"]), triton.cdiv(m, MATMUL["BLOCK_M"]))
    _matmul_kernel[grid](a_mm, b_mn.contiguous(), out_mn, m, n, **MATMUL)
    return out_mn


def _fake_forward(x_md, y_me, sigma):
    m = x_md.shape[0]
    shapes = ((), x_md.shape, (m, m), (m, m), y_me.shape, (m, m), (m, m))
    return tuple(x_md.new_empty(shape, dtype=torch.float32) for shape in shapes)


nhsic = register(
    "nhsic",
    "(Tensor x, Tensor y, float sigma) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    nhsic_forward,
    _fake_forward,
)
nhsic_grad = register(
    "nhsic_grad",
    "(Tensor grad, Tensor rows, Tensor k, Tensor p_self, Tensor p_other, float sigma, ScalarType dtype) -> Tensor",
    nhsic_backward,
    lambda grad, rows, k, p_self, p_other, sigma, dtype: rows.new_empty(rows.shape, dtype=dtype),
)


def _save(ctx, inputs, output):
    x_md, y_me, ctx.sigma = inputs
    ctx.dtypes = x_md.dtype, y_me.dtype
    _, x_md, kx, px, y_me, ky, py = output
    ctx.save_for_backward(*(x_md, kx) if ctx.needs_input_grad[0] else (None, None), px,
                          *(y_me, ky) if ctx.needs_input_grad[1] else (None, None), py)  # fmt: skip


def _backward(ctx, grad, *_):
    x_md, kx, px, y_me, ky, py = ctx.saved_tensors
    of_x = nhsic_grad(grad, x_md, kx, px, py, ctx.sigma, ctx.dtypes[0]) if ctx.needs_input_grad[0] else None
    of_y = nhsic_grad(grad, y_me, ky, py, px, ctx.sigma, ctx.dtypes[1]) if ctx.needs_input_grad[1] else None
    return of_x, of_y, None


nhsic.register_autograd(_backward, setup_context=_save)


def launches() -> list[Launch]:
    narrow = frozenset(["_value_kernel", "_gaussian_kernel"])  # one number per row; a transposed store

    def call(m: int, d: int, dtype: torch.dtype):
        value, rows, k, p, _, _, p_other = nhsic_forward(empty(m, d, dtype=dtype), empty(m, d, dtype=dtype), 5.0)
        nhsic_backward(value, rows, k, p, p_other, 5.0, dtype)

    return [
        Launch(f"m{m}", dtype, lambda m=m, d=d: call(m, 1024, d), narrow)
        for m in (512, 2048)
        for dtype, d in STORAGE.items()
    ]
