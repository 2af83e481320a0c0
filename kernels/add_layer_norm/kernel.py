"""add_layer_norm in Triton: one pass forward; backward, one pass over the rows and the sum of its partial column sums.

Shapes: D width, R rows of a tile, G groups of rows (programs of the backward pass), K column sums of width D.
A program takes every G-th tile [R,D]: weight, bias and partial sums then move once per program, not once per tile.
The forward pass stores mean and 1/deviation, 8 bytes beside a row's D numbers of 2 to 4 bytes: the backward pass needs two
reductions over a row instead of four, and each reduction synchronises all warps.
"""

import math
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from mimir_fast.kernels._shared.column_sums import prepared_sums
from mimir_fast.kernels._shared.launch import (
    FUSED,
    STORAGE,
    Launch,
    Prepared,
    contiguous_strides,
    empty,
    memoised,
    nothing,
)
from mimir_fast.kernels._shared.patch_tile import tile_block, tile_rows
from mimir_fast.kernels._shared.registration import register

# At least this many rows per program: parameters and partial sums are then at most a sixteenth of the traffic.
ROWS_PER_PROGRAM = 16
# An H100's, where all programs run at once.  Not read from the device: results would depend on it.
MULTIPROCESSORS = 132
# Per thread of the backward kernel, at most; with more of them fewer warps fit on a multiprocessor.
REGISTERS = 96
# Warps that fit on a multiprocessor, by whether there are column sums, which take registers.
WARPS = {False: 32, True: 20}


@triton.jit
def _tile(tile, rows, D: tl.constexpr):
    """A tile's rows [R,1], its offsets [R,D] (int64) in contiguous rows, and which of its numbers exist."""
    row_R1 = tile * tile_rows(D) + tl.arange(0, tile_rows(D))[:, None]
    column_1D = tl.arange(0, tile_block(D))[None, :]
    return row_R1, row_R1.to(tl.int64) * D + column_1D, (row_R1 < rows) & (column_1D < D)


@triton.jit
def _row(pointer, D: tl.constexpr):
    """[1,D] in fp32."""
    column_1D = tl.arange(0, tile_block(D))[None, :]
    return tl.load(pointer + column_1D, mask=column_1D < D, other=0).to(tl.float32)


@triton.jit
def _add_norm_kernel(
    x, delta, delta_bias, keep, weight, bias, s, n, statistics, rows, T, stride_b, stride_t, eps, D: tl.constexpr
):
    """formula      s = x + (delta + delta_bias) * keep; n = (s - mean) * rstd * weight + bias, rstd = 1 / sqrt(var + eps)
    shapes       x [rows,D] with strides, delta [rows,D], delta_bias, weight, bias [D], keep [rows/T] -> s, n [rows,D],
                 statistics [2,rows]
    dtypes       any float storage; fp32 arithmetic on the sum as stored, fp32 statistics (mean, rstd)
    bytes        x, delta, s and n once, the statistics once, the rest once per program; without delta no s
    determinism  exact: every row has one program, sums in a fixed order
    source       Ba et al., Layer Normalization, 2016
    """
    column_1D = tl.arange(0, tile_block(D))[None, :]
    weight_1D, bias_1D = _row(weight, D), _row(bias, D)
    if delta_bias is not None:
        delta_bias_1D = _row(delta_bias, D)
    for tile in range(tl.program_id(0), tl.cdiv(rows, tile_rows(D)), tl.num_programs(0)):
        row_R1, place_RD, exists_RD = _tile(tile, rows, D)
        x_R1 = x + (row_R1 // T).to(tl.int64) * stride_b + (row_R1 % T).to(tl.int64) * stride_t
        sum_RD = tl.load(x_R1 + column_1D, mask=exists_RD, other=0).to(tl.float32)
        if delta is not None:
            delta_RD = tl.load(delta + place_RD, mask=exists_RD, other=0).to(tl.float32)
            if delta_bias is not None:
                delta_RD += delta_bias_1D
            if keep is not None:
                delta_RD *= tl.load(keep + row_R1 // T, mask=row_R1 < rows, other=0).to(tl.float32)
            stored_RD = (sum_RD + delta_RD).to(s.dtype.element_ty)
            tl.store(s + place_RD, stored_RD, mask=exists_RD)
            # The statistics are of the sum as stored, which is what the backward pass reads.
            sum_RD = stored_RD.to(tl.float32)
        mean_R1 = tl.sum(sum_RD, axis=1, keep_dims=True) / D
        # Columns past D hold zeros: centred, each would add mean^2 to the variance.
        centred_RD = tl.where(column_1D < D, sum_RD - mean_R1, 0.0)
        rstd_R1 = 1.0 / tl.sqrt(tl.sum(centred_RD * centred_RD, axis=1, keep_dims=True) / D + eps)
        tl.store(statistics + row_R1, mean_R1, mask=row_R1 < rows)
        tl.store(statistics + rows + row_R1, rstd_R1, mask=row_R1 < rows)
        normed_RD = centred_RD * rstd_R1 * weight_1D + bias_1D
        tl.store(n + place_RD, normed_RD.to(n.dtype.element_ty), mask=exists_RD)


@triton.jit
def _add_norm_grad_kernel(
    ds, dn, s, statistics, weight, keep, dx, d_delta, partials, rows, T,
    D: tl.constexpr, OF_NORM: tl.constexpr, OF_DELTA_BIAS: tl.constexpr,
):  # fmt: skip
    """formula      with h = (s - mean) * rstd and p = dn * weight: dx = ds + (p - mean(p) - h * mean(p h)) * rstd;
                 d_delta = dx * keep; partials: a group's sums over rows of dn h and dn (if OF_NORM), and of d_delta (if
                 OF_DELTA_BIAS)
    shapes       ds, dn, s [rows,D], statistics [2,rows], weight [D], keep [rows/T] -> dx, d_delta [rows,D], partials [K,G,D]
    dtypes       any float storage; fp32 arithmetic and partials
    bytes        ds, dn, s, dx and d_delta once (ds and d_delta may be None), the statistics once, the rest once per program
    determinism  fixed order; every element has one writer
    source       derivative of _add_norm_kernel
    """
    R: tl.constexpr = tile_rows(D)
    column_1D = tl.arange(0, tile_block(D))[None, :]
    weight_1D = _row(weight, D)
    d_weight_RD = tl.zeros([R, tile_block(D)], tl.float32)
    d_bias_RD = tl.zeros([R, tile_block(D)], tl.float32)
    d_delta_bias_RD = tl.zeros([R, tile_block(D)], tl.float32)
    for tile in range(tl.program_id(0), tl.cdiv(rows, R), tl.num_programs(0)):
        row_R1, place_RD, exists_RD = _tile(tile, rows, D)
        dn_RD = tl.load(dn + place_RD, mask=exists_RD, other=0).to(tl.float32)
        s_RD = tl.load(s + place_RD, mask=exists_RD, other=0).to(tl.float32)
        mean_R1 = tl.load(statistics + row_R1, mask=row_R1 < rows, other=0)
        rstd_R1 = tl.load(statistics + rows + row_R1, mask=row_R1 < rows, other=0)
        normed_RD = (s_RD - mean_R1) * rstd_R1
        product_RD = dn_RD * weight_1D
        along_R1 = tl.sum(product_RD * normed_RD, axis=1, keep_dims=True) / D
        dx_RD = (product_RD - tl.sum(product_RD, axis=1, keep_dims=True) / D - normed_RD * along_R1) * rstd_R1
        if ds is not None:
            dx_RD += tl.load(ds + place_RD, mask=exists_RD, other=0).to(tl.float32)
        tl.store(dx + place_RD, dx_RD.to(dx.dtype.element_ty), mask=exists_RD)
        # From here on dx_RD is delta's gradient: keep weights the branch, not the residual stream.
        if keep is not None:
            dx_RD *= tl.load(keep + row_R1 // T, mask=row_R1 < rows, other=0).to(tl.float32)
        if d_delta is not None:
            tl.store(d_delta + place_RD, dx_RD.to(d_delta.dtype.element_ty), mask=exists_RD)
        if OF_NORM:
            d_weight_RD += dn_RD * normed_RD
            d_bias_RD += dn_RD
        if OF_DELTA_BIAS:
            d_delta_bias_RD += dx_RD
    # partials is [K,G,D]: this program's row of the first sum, and the step to the next sum.
    partials += tl.program_id(0) * D + column_1D
    step = tl.num_programs(0) * D
    if OF_NORM:
        tl.store(partials, tl.sum(d_weight_RD, axis=0, keep_dims=True), mask=column_1D < D)
        tl.store(partials + step, tl.sum(d_bias_RD, axis=0, keep_dims=True), mask=column_1D < D)
    if OF_DELTA_BIAS:
        partials += 2 * step if OF_NORM else 0
        tl.store(partials, tl.sum(d_delta_bias_RD, axis=0, keep_dims=True), mask=column_1D < D)


def add_layer_norm_forward(
    x: Tensor,
    delta: Tensor | None,
    delta_bias_D: Tensor | None,
    weight_D: Tensor,
    bias_D: Tensor,
    eps: float,
    out_dtype: torch.dtype,
    keep_B: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The sum [...,D] (empty without delta), the normalised sum [...,D], mean and 1/deviation of every row [2,rows]."""
    x = _rows_of(x)
    launch = _prepared_forward(
        x.shape, x.stride(), x.dtype, delta is None, None if keep_B is None else keep_B.shape[0], eps, out_dtype
    )
    tensors = (
        x,
        _contiguous(delta),
        _contiguous(delta_bias_D),
        _contiguous(keep_B),
        weight_D.contiguous(),
        bias_D.contiguous(),
    )
    s, n, statistics = launch(*tensors)
    return nothing(x) if s is None else s, n, statistics


@memoised
def _prepared_forward(
    shape: torch.Size,
    strides: tuple[int, ...],
    dtype: torch.dtype,
    alone: bool,
    images: int | None,
    eps: float,
    out_dtype: torch.dtype,
) -> Prepared:
    """alone: without delta, where the sum is x; images: how many keep has; x that is not contiguous has three dimensions."""
    D, rows = shape[-1], math.prod(shape[:-1])
    # Rows per run, and strides from run to run and from row to row.
    run: tuple[int, ...] = rows, 0, D
    if strides != contiguous_strides(shape):
        run = shape[1], *strides[:2]
    elif images is not None and images > 1:
        run = rows // images, rows // images * D, D
    results = (None if alone else (shape, dtype), (shape, out_dtype), ((2, rows), torch.float32))
    grid, options = (groups(rows, D, sums=False),), {"D": D, "num_warps": _warps(D), **FUSED}
    return Prepared(_add_norm_kernel, grid, rows, *run, eps, results=results, **options)


def add_layer_norm_backward(
    ds: Tensor | None,
    dn: Tensor,
    s: Tensor,
    statistics: Tensor,
    weight_D: Tensor,
    delta_dtype: torch.dtype | None,
    of_norm: bool,
    delta_bias_dtype: torch.dtype | None,
    keep_B: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients in x [...,D], delta [...,D], weight, bias and delta_bias [D]; empty where not asked for.

    delta_dtype         dtype of delta's gradient where it is not x's gradient: another dtype than s, or keep is given
    of_norm             whether weight and bias need gradients
    delta_bias_dtype    None if delta_bias needs no gradient
    """
    images, of_delta_bias = 1 if keep_B is None else keep_B.shape[0], delta_bias_dtype is not None
    norm_dtype = weight_D.dtype if of_norm else None
    launch, launch_sums = _prepared_backward(s.shape, s.dtype, images, delta_dtype, norm_dtype, delta_bias_dtype)
    tensors = _contiguous(ds), dn.contiguous(), s.contiguous(), statistics, weight_D.contiguous(), _contiguous(keep_B)
    dx, d_delta, partials_KGD = launch(*tensors)
    sums = launch_sums(partials_KGD) if launch_sums else []
    # What was not asked for is empty.
    d_delta = nothing(s) if d_delta is None else d_delta
    d_weight, d_bias = sums[:2] if of_norm else (nothing(weight_D), nothing(weight_D))
    return dx, d_delta, d_weight, d_bias, sums[2 * of_norm] if of_delta_bias else nothing(s)


@memoised
def _prepared_backward(
    shape: torch.Size,
    dtype: torch.dtype,
    images: int,
    delta_dtype: torch.dtype | None,
    norm_dtype: torch.dtype | None,
    delta_bias_dtype: torch.dtype | None,
) -> tuple[Prepared, Prepared | None]:
    """The kernel over the rows, and the sums of its partial sums, if there are any."""
    of_norm, of_delta_bias = norm_dtype is not None, delta_bias_dtype is not None
    dtypes = tuple(dtype for dtype in (norm_dtype, norm_dtype, delta_bias_dtype) if dtype is not None)
    D, rows, count = shape[-1], math.prod(shape[:-1]), len(dtypes)
    programs = groups(rows, D, count > 0)
    of_delta = None if delta_dtype is None else (shape, delta_dtype)
    results = (shape, dtype), of_delta, ((count, programs, D), torch.float32)
    constants = {"D": D, "OF_NORM": of_norm, "OF_DELTA_BIAS": of_delta_bias}
    options = {"num_warps": _warps(D), "maxnreg": REGISTERS, **FUSED}
    launch = Prepared(_add_norm_grad_kernel, (programs,), rows, rows // images, results=results, **constants, **options)
    return launch, prepared_sums((count, programs, D), dtypes) if dtypes else None


def _rows_of(x: Tensor) -> Tensor:
    """x, copied only if two strides do not reach all its rows."""
    return x if x.ndim == 3 and x.stride(2) == 1 else x.contiguous()


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def _warps(D: int) -> int:
    """Warps of a program: 8 numbers of a tile for every thread, which is one 16-byte access in bf16."""
    return min(32, max(4, tile_block(D) // 256))


def groups(rows: int, D: int, sums: bool) -> int:
    """Number of programs G.  A function of the shape alone, so that sums have the same order on every device."""
    least = max(ROWS_PER_PROGRAM, tile_rows(D))
    return min(triton.cdiv(rows, least), MULTIPROCESSORS * max(1, WARPS[sums] // _warps(D)))


def _fake_forward(x, delta, delta_bias_D, weight_D, bias_D, eps, out_dtype, keep_B):
    rows = x.numel() // x.shape[-1]
    s = x.new_empty(0) if delta is None else x.new_empty(x.shape)
    return s, x.new_empty(x.shape, dtype=out_dtype), x.new_empty((2, rows), dtype=torch.float32)


def _fake_backward(ds, dn, s, statistics, weight_D, delta_dtype, of_norm, delta_bias_dtype, keep_B):
    D = s.shape[-1]
    d_delta = s.new_empty(0) if delta_dtype is None else s.new_empty(s.shape, dtype=delta_dtype)
    d_weight, d_bias = (weight_D.new_empty(D if of_norm else 0) for _ in range(2))
    d_delta_bias = s.new_empty(0) if delta_bias_dtype is None else s.new_empty(D, dtype=delta_bias_dtype)
    return s.new_empty(s.shape), d_delta, d_weight, d_bias, d_delta_bias


def _save(ctx, inputs, output):
    x, delta, delta_bias_D, weight_D, bias_D, _, _, keep_B = inputs
    s, n, statistics = output
    # A gradient that nothing gives stays None: zeros would have to be written, read and added.
    ctx.set_materialize_grads(False)
    # Without delta s is empty, and op.py returns x in its place.
    ctx.mark_non_differentiable(*((s, statistics) if delta is None else (statistics,)))
    ctx.dtypes = [None if t is None else t.dtype for t in (delta, delta_bias_D, bias_D)]
    ctx.out = n.dtype
    ctx.save_for_backward(x if delta is None else s, statistics, weight_D, keep_B)


def _backward(ctx, ds, dn, _):
    s, statistics, weight_D, keep_B = ctx.saved_tensors
    delta_dtype, delta_bias_dtype, bias_dtype = ctx.dtypes
    of_x, of_delta, of_delta_bias, of_weight, of_bias, _, _, _ = ctx.needs_input_grad
    # None where only the sum was used.
    if dn is None:
        dn = torch.zeros_like(s, dtype=ctx.out)
    of_norm, copied = of_weight or of_bias, of_delta and (keep_B is not None or delta_dtype != s.dtype)
    dx, d_delta, d_weight, d_bias, d_delta_bias = add_layer_norm_grad(
        ds,
        dn,
        s,
        statistics,
        weight_D,
        delta_dtype if copied else None,
        of_norm,
        delta_bias_dtype if of_delta_bias else None,
        keep_B,
    )
    d_delta = d_delta if copied else dx
    # Both sums of the norm come in weight's dtype, which need not be bias's.
    return (
        dx if of_x else None, d_delta if of_delta else None, d_delta_bias if of_delta_bias else None,
        d_weight if of_weight else None, d_bias.to(bias_dtype) if of_bias else None, None, None, None,
    )  # fmt: skip


add_layer_norm = register(
    "add_layer_norm",
    "(Tensor x, Tensor? delta, Tensor? delta_bias, Tensor weight, Tensor bias, float eps, ScalarType out_dtype,"
    " Tensor? keep) -> (Tensor, Tensor, Tensor)",
    add_layer_norm_forward,
    _fake_forward,
    gradient=(_save, _backward),
)
add_layer_norm_grad = register(
    "add_layer_norm_grad",
    "(Tensor? ds, Tensor dn, Tensor s, Tensor statistics, Tensor weight, ScalarType? delta_dtype, bool of_norm,"
    " ScalarType? delta_bias_dtype, Tensor? keep) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    add_layer_norm_backward,
    _fake_backward,
)


def launches() -> list[Launch]:
    half, widths = torch.bfloat16, (128, 192, 384, 768, 1024, 1280)
    cases = [(f"D{D} fp32 residual", "bf16", (D, torch.float32, half)) for D in widths]
    cases += [(f"D{D} bf16 residual", "bf16", (D, half, half)) for D in (128, 768)]
    cases += [(f"D{D}", name, (D, torch.float32, STORAGE[name])) for D in (128, 768) for name in ("fp16", "fp32")]

    def added(D: int, residual: torch.dtype, compute: torch.dtype, keep_B: Tensor | None = None):
        """A residual step within a block, with the gradients of training and with those of the attack."""
        x, delta, weight = empty(8, 66, D, dtype=residual)[:, 2:], empty(8, 64, D, dtype=compute), empty(D)
        s, n, statistics = add_layer_norm_forward(
            x, delta, empty(D, dtype=compute), weight, weight, 1e-6, compute, keep_B
        )
        copied = compute if compute != residual or keep_B is not None else None
        for learned in (compute, None):
            add_layer_norm_backward(s, n, s, statistics, weight, copied, learned is not None, learned, keep_B)

    def first(D: int, residual: torch.dtype, compute: torch.dtype):
        """The first block's norm, which has nothing to add."""
        x, weight = empty(8, 64, D, dtype=residual), empty(D)
        _, n, statistics = add_layer_norm_forward(x, None, None, weight, weight, 1e-6, compute)
        for learned in (True, False):
            add_layer_norm_backward(None, n, x, statistics, weight, None, learned, None)

    # It writes 32 numbers per program.
    narrow = frozenset(["_add_partials_kernel"])
    launched = [Launch(config, name, partial(added, *sizes), narrow) for config, name, sizes in cases]
    cases = [case for case in cases if case[2][0] in (128, 768)]
    launched += [Launch(f"{config}, first", name, partial(first, *sizes), narrow) for config, name, sizes in cases]
    cases = [case for case in cases if case[1] == "bf16" and case[2][0] == 768]
    launched += [
        Launch(f"{config}, keep", name, partial(added, *sizes, empty(8)), narrow) for config, name, sizes in cases
    ]
    return launched
