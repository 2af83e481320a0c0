"""short_attention forward.  Shapes as in heads.py; R rows of a tile of queries, K keys of a part, W columns.

A program loads all keys and values of its heads once and loops over tiles of queries.
"""

import triton
import triton.language as tl

from mimir_fast.kernels.short_attention.heads import (
    _group,
    _load_parts,
    _query_rows,
    _sum_places,
    before,
    exponent_scale,
    key_parts,
    stacked,
)


@triton.jit
def _mix(q_RW, k, v, T: tl.constexpr, PARTS: tl.constexpr, SCALE: tl.constexpr):
    """softmax(q k^T) v [R,W], and log2 of the sums of 2^(scaled scores) [R,1].

    Online softmax: sums so far are rescaled when a part of the keys has a new maximum.
    """
    max_R1 = None
    for i in tl.static_range(len(PARTS)):
        score_RK = tl.dot(q_RW, tl.trans(k[i]), input_precision="tf32x3")
        # Only the last part can reach past T; the condition is known when compiling.
        if before(PARTS, i) + PARTS[i] > T:
            key_1K = before(PARTS, i) + tl.arange(0, PARTS[i])[None, :]
            score_RK = tl.where(key_1K < T, score_RK, float("-inf"))
        part_R1 = tl.max(score_RK, axis=1, keep_dims=True) * SCALE
        highest_R1 = part_R1 if i == 0 else tl.maximum(max_R1, part_R1)
        weight_RK = tl.exp2(score_RK * SCALE - highest_R1)
        part_R1 = tl.sum(weight_RK, axis=1, keep_dims=True)
        if i == 0:
            sum_R1 = part_R1
            out_RW = tl.dot(weight_RK.to(v[i].dtype), v[i], input_precision="tf32x3")
        else:
            shrink_R1 = tl.exp2(max_R1 - highest_R1)
            sum_R1 = sum_R1 * shrink_R1 + part_R1
            out_RW = tl.dot(weight_RK.to(v[i].dtype), v[i], out_RW * shrink_R1, input_precision="tf32x3")
        max_R1 = highest_R1
    return out_RW / sum_R1, max_R1 + tl.log2(sum_R1)


@triton.jit
def _attend_kernel(
    qkv, out, lse, N, T: tl.constexpr, FIRST: tl.constexpr, HEAD: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr
):
    """formula      out = softmax(q k^T / sqrt(d)) v per image and head, of the tokens from FIRST on; if lse is asked for:
                 log2 of the softmax's denominators
    shapes       qkv [B,T,3*N*d] -> out [B,T-FIRST,N*d], lse [B,N,T-FIRST], contiguous
    dtypes       any float storage, lse fp32; scores, softmax and sums in fp32, weights rounded to storage for the second
                 product
    bytes        qkv once (q from FIRST on), out and lse once
    determinism  fixed order
    source       Vaswani et al., Attention Is All You Need, 2017, section 3.2
    """
    PARTS: tl.constexpr = key_parts(T, KEYS)
    image, head, column_1W, exists_1W = _group(N, HEAD)
    D, queries = N * HEAD, T - FIRST
    qkv += image * T * 3 * D + column_1W
    out += image * queries * D + column_1W
    # Once for all blocks of queries: they stay in registers or shared memory.
    k = _load_parts(qkv + D, 3 * D, exists_1W, T, PARTS)
    v = _load_parts(qkv + 2 * D, 3 * D, exists_1W, T, PARTS)
    for start in range(0, queries, ROWS // stacked(HEAD)):
        row_R1, exists_RW = _query_rows(start, queries, exists_1W, HEAD, ROWS)
        q_RW = tl.load(qkv + (FIRST + row_R1) * (3 * D), mask=exists_RW, other=0)
        mixed_RW, lse_R1 = _mix(q_RW, k, v, T, PARTS, exponent_scale(HEAD))
        # In other heads' columns there is their values' mean with this head's weights: the mask leaves it out.
        tl.store(out + row_R1 * D, mixed_RW.to(out.dtype.element_ty), mask=exists_RW)
        if lse is not None:
            place_R, exists_R = _sum_places(start, queries, head, N, HEAD, ROWS)
            tl.store(lse + (image * N + head) * queries + place_R, tl.reshape(lse_R1, [ROWS]), mask=exists_R)
