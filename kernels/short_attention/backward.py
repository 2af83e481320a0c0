"""short_attention backward of few tokens, whose scores fit into one tile.  Shapes as in heads.py; R rows of a tile of queries.

Memory limits such a program: nothing but qkv and the output's gradient is read, and the softmax is computed again.
Scores are [K,R]: their products with the output's gradient and with q, which are summed over the tiles of queries, then need
no transposition; only the one with k does.
"""

import triton
import triton.language as tl

from mimir_fast.kernels.short_attention.heads import _group, _own_head, _query_rows, columns, exponent_scale, stacked

# Rows of a tile of sums: the fewest that a product takes.
SUM_ROWS = tl.constexpr(16)


@triton.jit
def _fill_with_zeros(grad_qkv, stride, exists_1W, FIRST: tl.constexpr, ROWS: tl.constexpr):
    """Gradient in q of tokens that are no queries."""
    for start in range(0, FIRST, ROWS):
        row_R1 = start + tl.arange(0, ROWS)[:, None]
        tl.store(grad_qkv + row_R1 * stride, 0.0, mask=(row_R1 < FIRST) & exists_1W)


@triton.jit
def _add_rows(tile_XW, sum_GW):
    """The sum of a tile's rows added to every row of sum."""
    # A product with ones: tl.sum would exchange numbers between lanes, at four times the instructions.
    ones_GX = tl.full([SUM_ROWS, tile_XW.shape[0]], 1.0, tile_XW.dtype)
    return tl.dot(ones_GX, tile_XW, sum_GW, input_precision="tf32x3")


@triton.jit
def _store_sum(sums, sum_GW, exists_1W):
    """Store one of sum's rows, which are all alike."""
    row_G1 = tl.arange(0, SUM_ROWS)[:, None]
    tl.store(sums + row_G1 * 0, sum_GW, mask=(row_G1 == 0) & exists_1W)


@triton.jit
def _attend_grad_kernel(
    grad, qkv, grad_qkv, sums, N, scale,
    T: tl.constexpr, FIRST: tl.constexpr, HEAD: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """formula      with P = softmax(q k^T scale), dP = grad v^T and dS = P (dP - sum over keys of P dP):
                 dq = dS k scale, dk = dS^T q scale, dv = P^T grad, per image and head; sums[i]: their sum over image i's
                 tokens, if asked for
    shapes       grad [B,T-FIRST,N*d], qkv [B,T,3*N*d] -> grad_qkv [B,T,3*N*d], sums [B,3*N*d], contiguous
    dtypes       any float storage, fp32 sums; scores and softmax in fp32, P and dS rounded to storage for the last three
                 products
    bytes        qkv and grad once, grad_qkv and sums once
    determinism  fixed order; every element has one writer
    source       derivative of _attend_kernel
    """
    image, _, column_1W, exists_1W = _group(N, HEAD)
    D, queries = N * HEAD, T - FIRST
    dtype = grad_qkv.dtype.element_ty
    grad += image * queries * D + column_1W
    qkv += image * T * 3 * D + column_1W
    grad_qkv += image * T * 3 * D + column_1W
    key_K1 = tl.arange(0, KEYS)[:, None]
    exists_KW = (key_K1 < T) & exists_1W
    k_KW = tl.load(qkv + D + key_K1 * (3 * D), mask=exists_KW, other=0)
    v_KW = tl.load(qkv + 2 * D + key_K1 * (3 * D), mask=exists_KW, other=0)
    dk_KW, dv_KW = tl.zeros([KEYS, columns(HEAD)], tl.float32), tl.zeros([KEYS, columns(HEAD)], tl.float32)
    dq_sum_RW = tl.zeros([ROWS, columns(HEAD)], tl.float32)
    for start in range(0, queries, ROWS // stacked(HEAD)):
        row_R1, exists_RW = _query_rows(start, queries, exists_1W, HEAD, ROWS)
        q_RW = tl.load(qkv + (FIRST + row_R1) * (3 * D), mask=exists_RW, other=0)
        grad_RW = tl.load(grad + row_R1 * D, mask=exists_RW, other=0)
        score_KR = tl.dot(k_KW, tl.trans(q_RW), input_precision="tf32x3")
        score_KR = tl.where(key_K1 < T, score_KR, float("-inf"))
        highest_1R = tl.max(score_KR, axis=0, keep_dims=True) * exponent_scale(HEAD)
        weight_KR = tl.exp2(score_KR * exponent_scale(HEAD) - highest_1R)
        rsum_1R = 1.0 / tl.sum(weight_KR, axis=0, keep_dims=True)
        d_weight_KR = tl.dot(v_KW, tl.trans(grad_RW), input_precision="tf32x3")
        mean_1R = tl.sum(weight_KR * d_weight_KR, axis=0, keep_dims=True) * rsum_1R
        weight_KR *= rsum_1R
        dv_KW = tl.dot(weight_KR.to(dtype), grad_RW, dv_KW, input_precision="tf32x3")
        d_score_KR = (weight_KR * (d_weight_KR - mean_1R)).to(dtype)
        dk_KW = tl.dot(d_score_KR, q_RW, dk_KW, input_precision="tf32x3")
        dq_RW = tl.dot(tl.trans(d_score_KR), k_KW, input_precision="tf32x3")
        if sums is not None:
            dq_sum_RW += dq_RW
        tl.store(grad_qkv + (FIRST + row_R1) * (3 * D), (dq_RW * scale).to(dtype), mask=exists_RW)
    _fill_with_zeros(grad_qkv, 3 * D, exists_1W, FIRST, ROWS)
    dk, dv = (dk_KW * scale).to(dtype), dv_KW.to(dtype)
    tl.store(grad_qkv + D + key_K1 * (3 * D), dk, mask=exists_KW)
    tl.store(grad_qkv + 2 * D + key_K1 * (3 * D), dv, mask=exists_KW)
    if sums is not None:
        sums += image * 3 * D + column_1W
        none_GW = tl.zeros([SUM_ROWS, columns(HEAD)], tl.float32)
        # Rows past the end add nothing, for their gradients are zero; other heads' columns hold products that mean nothing.
        dq_RW = tl.where(_own_head(HEAD, ROWS), dq_sum_RW * scale, 0.0).to(dtype)
        _store_sum(sums, _add_rows(dq_RW, none_GW), exists_1W)
        _store_sum(sums + D, _add_rows(dk, none_GW), exists_1W)
        _store_sum(sums + 2 * D, _add_rows(dv, none_GW), exists_1W)
