"""short_attention backward of many tokens, from what the forward pass kept.  Shapes as in heads.py.

Instructions limit such a program, not memory.  With the softmax's log-sum-exp kept, and its mean gradient as the sum of
output times gradient, a part of the keys is worked through without the others: no score stays in a register for long.
A program loads all keys and values of its heads once, keeps their gradients in registers and loops over tiles of queries.
Scores are [K,R], for the reason that backward.py gives.
"""

# ruff: noqa: RUF005 (Triton has no starred tuples)

import triton
import triton.language as tl

from mimir_fast.kernels.short_attention.backward import SUM_ROWS, _add_rows, _fill_with_zeros, _store_sum
from mimir_fast.kernels.short_attention.heads import (
    _group,
    _load_parts,
    _own_head,
    _query_rows,
    _sum_places,
    before,
    columns,
    exponent_scale,
    key_parts,
    stacked,
)


@triton.jit
def _zero_parts(W: tl.constexpr, PARTS: tl.constexpr):
    tiles: tl.tuple = ()
    for i in tl.static_range(len(PARTS)):
        tiles = tiles + (tl.zeros([PARTS[i], W], tl.float32),)
    return tiles


@triton.jit
def _add_gradients(
    q_RW, grad_RW, lse_1R, mean_1R, k, v, dk, dv, T: tl.constexpr, PARTS: tl.constexpr, SCALE: tl.constexpr
):
    """Gradient in q [R,W] times sqrt(d), and dk (times sqrt(d)) and dv with this tile of queries added."""
    dq_RW = tl.zeros(q_RW.shape, tl.float32)
    more_dk: tl.tuple = ()
    more_dv: tl.tuple = ()
    for i in tl.static_range(len(PARTS)):
        score_KR = tl.dot(k[i], tl.trans(q_RW), input_precision="tf32x3")
        weight_KR = tl.exp2(score_KR * SCALE - lse_1R)
        if before(PARTS, i) + PARTS[i] > T:
            # A key past the end has a score of 0, and where all others are far below its weight would be infinite.
            key_K1 = before(PARTS, i) + tl.arange(0, PARTS[i])[:, None]
            weight_KR = tl.where(key_K1 < T, weight_KR, 0.0)
        d_weight_KR = tl.dot(v[i], tl.trans(grad_RW), input_precision="tf32x3")
        d_score_KR = (weight_KR * (d_weight_KR - mean_1R)).to(q_RW.dtype)
        more_dv = more_dv + (tl.dot(weight_KR.to(q_RW.dtype), grad_RW, dv[i], input_precision="tf32x3"),)
        more_dk = more_dk + (tl.dot(d_score_KR, q_RW, dk[i], input_precision="tf32x3"),)
        dq_RW = tl.dot(tl.trans(d_score_KR), k[i], dq_RW, input_precision="tf32x3")
    return dq_RW, more_dk, more_dv


@triton.jit
def _attend_long_grad_kernel(
    grad, qkv, out, lse, grad_qkv, sums, N, scale,
    T: tl.constexpr, FIRST: tl.constexpr, HEAD: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, HOIST: tl.constexpr,
):  # fmt: skip
    """formula      with P = 2^(log2(e) q k^T scale - lse), dP = grad v^T and dS = P (dP - sum over a row of grad out):
                 dq, dk, dv and sums as those of _attend_grad_kernel
    shapes       grad, out [B,T-FIRST,N*d], qkv [B,T,3*N*d], lse [B,N,T-FIRST] -> grad_qkv [B,T,3*N*d], sums
                 [B,3*N*d], contiguous
    dtypes       as _attend_grad_kernel; lse fp32
    bytes        qkv, grad, out and lse once, grad_qkv and sums once
    determinism  fixed order; every element has one writer
    source       Dao et al., FlashAttention, 2022, appendix B
    """
    PARTS: tl.constexpr = key_parts(T, KEYS)
    image, head, column_1W, exists_1W = _group(N, HEAD)
    D, queries = N * HEAD, T - FIRST
    dtype = grad_qkv.dtype.element_ty
    grad += image * queries * D + column_1W
    out += image * queries * D + column_1W
    lse += (image * N + head) * queries
    qkv += image * T * 3 * D + column_1W
    grad_qkv += image * T * 3 * D + column_1W
    k = _load_parts(qkv + D, 3 * D, exists_1W, T, PARTS)
    v = _load_parts(qkv + 2 * D, 3 * D, exists_1W, T, PARTS)
    dk, dv = _zero_parts(columns(HEAD), PARTS), _zero_parts(columns(HEAD), PARTS)
    dq_sum_RW = tl.zeros([ROWS, columns(HEAD)], tl.float32)
    # Hoisted out of the loop, keys and values would be kept in registers as operands of the products, in three layouts.
    for start in tl.range(0, queries, ROWS // stacked(HEAD), disable_licm=not HOIST):
        row_R1, exists_RW = _query_rows(start, queries, exists_1W, HEAD, ROWS)
        q_RW = tl.load(qkv + (FIRST + row_R1) * (3 * D), mask=exists_RW, other=0)
        grad_RW = tl.load(grad + row_R1 * D, mask=exists_RW, other=0)
        out_RW = tl.load(out + row_R1 * D, mask=exists_RW, other=0)
        place_R, exists_R = _sum_places(start, queries, head, N, HEAD, ROWS)
        lse_1R = tl.load(lse + place_R, mask=exists_R, other=0)[None, :]
        mean_1R = tl.sum(grad_RW.to(tl.float32) * out_RW.to(tl.float32), axis=1)[None, :]
        dq_RW, dk, dv = _add_gradients(q_RW, grad_RW, lse_1R, mean_1R, k, v, dk, dv, T, PARTS, exponent_scale(HEAD))
        if sums is not None:
            dq_sum_RW += dq_RW
        tl.store(grad_qkv + (FIRST + row_R1) * (3 * D), (dq_RW * scale).to(dtype), mask=exists_RW)
    _fill_with_zeros(grad_qkv, 3 * D, exists_1W, FIRST, ROWS)
    dk_sum_GW = tl.zeros([SUM_ROWS, columns(HEAD)], tl.float32)
    dv_sum_GW = tl.zeros([SUM_ROWS, columns(HEAD)], tl.float32)
    for i in tl.static_range(len(PARTS)):
        key_K1 = before(PARTS, i) + tl.arange(0, PARTS[i])[:, None]
        exists_KW = (key_K1 < T) & exists_1W
        dk_KW, dv_KW = (dk[i] * scale).to(dtype), dv[i].to(dtype)
        tl.store(grad_qkv + D + key_K1 * (3 * D), dk_KW, mask=exists_KW)
        tl.store(grad_qkv + 2 * D + key_K1 * (3 * D), dv_KW, mask=exists_KW)
        if sums is not None:
            dk_sum_GW, dv_sum_GW = _add_rows(dk_KW, dk_sum_GW), _add_rows(dv_KW, dv_sum_GW)
    if sums is not None:
        sums += image * 3 * D + column_1W
        # Rows past the end add nothing, for their gradients are zero; other heads' columns hold products that mean nothing.
        dq_sum_RW = tl.where(_own_head(HEAD, ROWS), dq_sum_RW, 0.0)
        tl.store(sums, tl.sum(dq_sum_RW, axis=0, keep_dims=True) * scale, mask=exists_1W)
        _store_sum(sums + D, dk_sum_GW, exists_1W)
        _store_sum(sums + 2 * D, dv_sum_GW, exists_1W)
