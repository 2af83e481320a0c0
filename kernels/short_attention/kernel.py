"""short_attention in Triton.  Shapes: B batch, T tokens, N heads, d numbers per head, D = N*d.

A program handles one image and a group of neighbouring heads, W columns in all: at least 16, so that rows are whole sectors
and products long enough for matrix instructions.  For one head of a group the other heads' columns of q are set to zero.
It loads all keys and values once and loops over blocks of R query rows.  Keys and values are tuples of tiles [K,W]: tiles
are powers of two and T is often one more than such, so that the last tile is shorter.
In the backward kernel scores are [K,R]: their products with the output's gradient and with q, which are summed over the
blocks, then need no transposition; only the one with k does.
"""

# ruff: noqa: RUF005 (Triton has no starred tuples)

import math
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from mimir_fast.kernels._shared.launch import FUSED, STORAGE, Launch, Prepared, empty, memoised
from mimir_fast.kernels._shared.registration import register
from mimir_fast.kernels._shared.tiles import Tiles, chosen
from mimir_fast.kernels.short_attention.tiles import BACKWARD, FORWARD, alternatives

# In the order of tiles.py and of the two functions that choose them here.
TILES = ("ROWS", "KEYS", "num_warps")


@triton.constexpr_function
def heads_per_program(head: int) -> int:
    """Neighbouring heads of a group: as many as 16 columns hold, at least one."""
    return max(1, 16 // head)


@triton.constexpr_function
def columns(head: int) -> int:
    """Columns of a group, W: a power of two."""
    return max(16, triton.next_power_of_2(heads_per_program(head) * head))


@triton.constexpr_function
def key_parts(tokens: int, keys: int) -> tuple:
    """How many keys each part has: as many parts of `keys` as fit, and the rest rounded up to a power of two."""
    rest = tokens % keys
    return (keys,) * (tokens // keys) + ((max(16, triton.next_power_of_2(rest)),) if rest else ())


@triton.constexpr_function
def exponent_scale(head: int) -> float:
    """exp(s / sqrt(d)) = 2^(s * exponent_scale)."""
    return 1 / (math.sqrt(head) * math.log(2))


@triton.jit
def _group(N, HEAD: tl.constexpr):
    """This program's image (int64, so that offsets are), its columns [1,W] of D, which of them exist, and their heads [1,W]."""
    # The last group can have fewer heads than the others.
    groups = tl.cdiv(N, heads_per_program(HEAD))
    image = (tl.program_id(0) // groups).to(tl.int64)
    inside_1W = tl.arange(0, columns(HEAD))[None, :]
    column_1W = tl.program_id(0) % groups * (heads_per_program(HEAD) * HEAD) + inside_1W
    exists_1W = (inside_1W < heads_per_program(HEAD) * HEAD) & (column_1W < N * HEAD)
    return image, column_1W, exists_1W, inside_1W // HEAD


@triton.jit
def _load_parts(row, stride, exists_1W, T: tl.constexpr, PARTS: tl.constexpr):
    """All keys, or values: tiles [K,W]."""
    tiles: tl.tuple = ()
    for i in tl.static_range(len(PARTS)):
        key_K1 = i * PARTS[0] + tl.arange(0, PARTS[i])[:, None]
        tiles = tiles + (tl.load(row + key_K1 * stride, mask=(key_K1 < T) & exists_1W, other=0),)
    return tiles


@triton.jit
def _zero_parts(W: tl.constexpr, PARTS: tl.constexpr):
    tiles: tl.tuple = ()
    for i in tl.static_range(len(PARTS)):
        tiles = tiles + (tl.zeros([PARTS[i], W], tl.float32),)
    return tiles


@triton.jit
def _mix(q_RW, k, v, T: tl.constexpr, PARTS: tl.constexpr, SCALE: tl.constexpr):
    """softmax(q k^T) v [R,W], by online softmax: sums so far are rescaled when a part of the keys has a new maximum."""
    max_R1 = None
    for i in tl.static_range(len(PARTS)):
        score_RK = tl.dot(q_RW, tl.trans(k[i]), input_precision="tf32x3")
        # Only the last part can reach past T; the condition is known when compiling.
        if i * PARTS[0] + PARTS[i] > T:
            key_1K = i * PARTS[0] + tl.arange(0, PARTS[i])[None, :]
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
    return out_RW / sum_R1


@triton.jit
def _attend_kernel(qkv, out, N, T: tl.constexpr, HEAD: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr):
    """formula      out = softmax(q k^T / sqrt(d)) v per image and head
    shapes       qkv [B,T,3*N*d] -> out [B,T,N*d], contiguous
    dtypes       any float storage; scores, softmax and sums in fp32, weights rounded to storage for the second product
    bytes        qkv once, out once
    determinism  fixed order
    source       Vaswani et al., Attention Is All You Need, 2017, section 3.2
    """
    PARTS: tl.constexpr = key_parts(T, KEYS)
    image, column_1W, exists_1W, head_1W = _group(N, HEAD)
    D = N * HEAD
    qkv += image * T * 3 * D + column_1W
    out += image * T * D + column_1W
    # Once for all blocks of queries: they stay in registers or shared memory.
    k = _load_parts(qkv + D, 3 * D, exists_1W, T, PARTS)
    v = _load_parts(qkv + 2 * D, 3 * D, exists_1W, T, PARTS)
    for start in range(0, T, ROWS):
        row_R1 = start + tl.arange(0, ROWS)[:, None]
        exists_RW = (row_R1 < T) & exists_1W
        q_RW = tl.load(qkv + row_R1 * (3 * D), mask=exists_RW, other=0)
        out_RW = tl.zeros([ROWS, columns(HEAD)], tl.float32)
        for head in range(heads_per_program(HEAD)):
            mixed_RW = _mix(tl.where(head_1W == head, q_RW, 0.0), k, v, T, PARTS, exponent_scale(HEAD))
            out_RW = tl.where(head_1W == head, mixed_RW, out_RW)
        tl.store(out + row_R1 * D, out_RW.to(out.dtype.element_ty), mask=exists_RW)


@triton.jit
def _over_keys(tiles, PARTS: tl.constexpr, MAXIMUM: tl.constexpr):
    """Maximum or sum [1,R] over the keys of tiles [K,R]."""
    # Tiles of one size first, element by element: a reduction within a tile exchanges numbers between lanes and warps.
    tile_KR = tiles[0]
    for i in tl.static_range(1, len(PARTS)):
        if PARTS[i] == PARTS[0]:
            tile_KR = tl.maximum(tile_KR, tiles[i]) if MAXIMUM else tile_KR + tiles[i]
    all_1R = tl.max(tile_KR, axis=0, keep_dims=True) if MAXIMUM else tl.sum(tile_KR, axis=0, keep_dims=True)
    last: tl.constexpr = len(PARTS) - 1
    if PARTS[last] != PARTS[0]:
        if MAXIMUM:
            all_1R = tl.maximum(all_1R, tl.max(tiles[last], axis=0, keep_dims=True))
        else:
            all_1R += tl.sum(tiles[last], axis=0, keep_dims=True)
    return all_1R


@triton.jit
def _softmax(q_RW, k, T: tl.constexpr, PARTS: tl.constexpr, SCALE: tl.constexpr):
    """Weights [K,R] not yet divided by their sum over the keys, and the reciprocal of that sum [1,R]."""
    scores: tl.tuple = ()
    for i in tl.static_range(len(PARTS)):
        score_KR = tl.dot(k[i], tl.trans(q_RW), input_precision="tf32x3")
        if i * PARTS[0] + PARTS[i] > T:
            key_K1 = i * PARTS[0] + tl.arange(0, PARTS[i])[:, None]
            score_KR = tl.where(key_K1 < T, score_KR, float("-inf"))
        scores = scores + (score_KR,)
    highest_1R = _over_keys(scores, PARTS, True) * SCALE
    weights: tl.tuple = ()
    for i in tl.static_range(len(PARTS)):
        weights = weights + (tl.exp2(scores[i] * SCALE - highest_1R),)
    return weights, 1.0 / _over_keys(weights, PARTS, False)


@triton.jit
def _add_gradients(q_RW, grad_RW, k, v, dk, dv, T: tl.constexpr, PARTS: tl.constexpr, SCALE: tl.constexpr):
    """Gradient in q [R,W] times sqrt(d), and dk (times sqrt(d)) and dv with this block of queries added."""
    weights, rsum_1R = _softmax(q_RW, k, T, PARTS, SCALE)
    d_weights: tl.tuple = ()
    products: tl.tuple = ()
    for i in tl.static_range(len(PARTS)):
        d_weight_KR = tl.dot(v[i], tl.trans(grad_RW), input_precision="tf32x3")
        d_weights = d_weights + (d_weight_KR,)
        products = products + (weights[i] * d_weight_KR,)
    mean_1R = _over_keys(products, PARTS, False) * rsum_1R
    dq_RW = tl.zeros(q_RW.shape, tl.float32)
    more_dk: tl.tuple = ()
    more_dv: tl.tuple = ()
    for i in tl.static_range(len(PARTS)):
        weight_KR = weights[i] * rsum_1R
        more_dv = more_dv + (tl.dot(weight_KR.to(q_RW.dtype), grad_RW, dv[i], input_precision="tf32x3"),)
        d_score_KR = (weight_KR * (d_weights[i] - mean_1R)).to(q_RW.dtype)
        more_dk = more_dk + (tl.dot(d_score_KR, q_RW, dk[i], input_precision="tf32x3"),)
        dq_RW = tl.dot(tl.trans(d_score_KR), k[i], dq_RW, input_precision="tf32x3")
    return dq_RW, more_dk, more_dv


@triton.jit
def _attend_grad_kernel(
    grad, qkv, grad_qkv, N, scale, T: tl.constexpr, HEAD: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr
):
    """formula      with P = softmax(q k^T scale), dP = grad v^T and dS = P (dP - sum over keys of P dP):
                 dq = dS k scale, dk = dS^T q scale, dv = P^T grad, per image and head
    shapes       grad [B,T,N*d], qkv [B,T,3*N*d] -> grad_qkv [B,T,3*N*d], contiguous
    dtypes       any float storage; scores, softmax and sums in fp32, P and dS rounded to storage for the last three products
    bytes        qkv and grad once, grad_qkv once
    determinism  fixed order; every element has one writer
    source       derivative of _attend_kernel
    """
    PARTS: tl.constexpr = key_parts(T, KEYS)
    image, column_1W, exists_1W, head_1W = _group(N, HEAD)
    D = N * HEAD
    dtype = grad_qkv.dtype.element_ty
    grad += image * T * D + column_1W
    qkv += image * T * 3 * D + column_1W
    grad_qkv += image * T * 3 * D + column_1W
    k = _load_parts(qkv + D, 3 * D, exists_1W, T, PARTS)
    v = _load_parts(qkv + 2 * D, 3 * D, exists_1W, T, PARTS)
    dk, dv = _zero_parts(columns(HEAD), PARTS), _zero_parts(columns(HEAD), PARTS)
    for start in range(0, T, ROWS):
        row_R1 = start + tl.arange(0, ROWS)[:, None]
        exists_RW = (row_R1 < T) & exists_1W
        q_RW = tl.load(qkv + row_R1 * (3 * D), mask=exists_RW, other=0)
        grad_RW = tl.load(grad + row_R1 * D, mask=exists_RW, other=0)
        dq_RW = tl.zeros([ROWS, columns(HEAD)], tl.float32)
        for head in range(heads_per_program(HEAD)):
            own_q_RW, own_grad_RW = (tl.where(head_1W == head, q_RW, 0.0), tl.where(head_1W == head, grad_RW, 0.0))
            own_dq_RW, dk, dv = _add_gradients(own_q_RW, own_grad_RW, k, v, dk, dv, T, PARTS, exponent_scale(HEAD))
            dq_RW = tl.where(head_1W == head, own_dq_RW, dq_RW)
        tl.store(grad_qkv + row_R1 * (3 * D), (dq_RW * scale).to(dtype), mask=exists_RW)
    for i in tl.static_range(len(PARTS)):
        key_K1 = i * PARTS[0] + tl.arange(0, PARTS[i])[:, None]
        exists_KW = (key_K1 < T) & exists_1W
        tl.store(grad_qkv + D + key_K1 * (3 * D), (dk[i] * scale).to(dtype), mask=exists_KW)
        tl.store(grad_qkv + 2 * D + key_K1 * (3 * D), dv[i].to(dtype), mask=exists_KW)


def short_attention_forward(qkv_BTQ: Tensor, num_heads: int) -> Tensor:
    """The attention output [B,T,N*d]."""
    shape, dtype = qkv_BTQ.shape, qkv_BTQ.dtype
    sizes = chosen("_attend_kernel", shape[1], shape[2] // 3 // num_heads, dtype).values()
    (out_BTD,) = _prepared_forward(shape, num_heads, dtype, *sizes)(qkv_BTQ.contiguous())
    return out_BTD


@memoised
def _prepared_forward(shape: torch.Size, num_heads: int, dtype: torch.dtype, *sizes: int) -> Prepared:
    """shape: of qkv; sizes: the values of tile sizes that were chosen, none: our own."""
    B, T, Q = shape
    head = Q // 3 // num_heads
    tiles = dict(zip(TILES, sizes)) or forward_tiles(T, head, dtype.itemsize)
    options = {"T": T, "HEAD": head, **tiles, **FUSED}
    results = [((B, T, Q // 3), dtype)]
    return Prepared(_attend_kernel, _grid(B, num_heads, head), num_heads, results=results, **options)


def short_attention_backward(grad_BTD: Tensor, qkv_BTQ: Tensor, num_heads: int) -> Tensor:
    """Gradient in qkv [B,T,3*N*d]."""
    shape, dtype = qkv_BTQ.shape, qkv_BTQ.dtype
    sizes = chosen("_attend_grad_kernel", shape[1], shape[2] // 3 // num_heads, dtype).values()
    launch = _prepared_backward(shape, num_heads, dtype, *sizes)
    (grad_qkv_BTQ,) = launch(grad_BTD.contiguous(), qkv_BTQ.contiguous())
    return grad_qkv_BTQ


@memoised
def _prepared_backward(shape: torch.Size, num_heads: int, dtype: torch.dtype, *sizes: int) -> Prepared:
    B, T, Q = shape
    head = Q // 3 // num_heads
    tiles = dict(zip(TILES, sizes)) or backward_tiles(T, head, dtype.itemsize)
    options = {"T": T, "HEAD": head, **tiles, **FUSED}
    # 1/sqrt(d) for the gradients in q and k: the factor in the exponent holds a 1/ln 2 beside it, for powers of two.
    grid, results = _grid(B, num_heads, head), [(shape, dtype)]
    return Prepared(_attend_grad_kernel, grid, num_heads, head**-0.5, results=results, **options)


def _grid(batch: int, num_heads: int, head: int) -> tuple[int]:
    return (batch * triton.cdiv(num_heads, heads_per_program(head)),)


def forward_tiles(tokens: int, head: int, itemsize: int) -> dict[str, int]:
    """Query rows of a block, keys of a part, and warps: the largest for which no kernel spills registers."""
    # tl.dot takes no side shorter than 16.
    needed = max(16, triton.next_power_of_2(tokens))
    # fp32 products are three tf32 products, and take three times the registers.
    if itemsize == 4:
        return {"ROWS": min(32, needed), "KEYS": 64, "num_warps": min(4, needed // 8)}
    rows = min(32 if 64 < tokens <= 256 and head <= 16 else 64, needed)
    return {"ROWS": rows, "KEYS": 64, "num_warps": rows // 16}


def backward_tiles(tokens: int, head: int, itemsize: int) -> dict[str, int]:
    """As forward_tiles, for the backward kernel.

    Where there are several parts KEYS is 16 * num_warps or more, so that no warp idles; heads wider than 64 leave no registers
    for that.
    """
    needed = max(16, triton.next_power_of_2(tokens))
    if itemsize == 4:
        return {"ROWS": 16, "KEYS": 64, "num_warps": 8 if head > 32 else 4}
    if tokens <= 64:
        # 16 bytes of a tile for every thread.
        warps = 8 if head > 64 else min(4, needed * columns(head) // 256)
        return {"ROWS": needed, "KEYS": 64, "num_warps": warps}
    if tokens > (272 if head <= 16 else 80) and not 16 < head <= 32:
        return {"ROWS": 16, "KEYS": 128, "num_warps": 8}
    if head > 64:
        return {"ROWS": 16, "KEYS": 32, "num_warps": 8}
    return {"ROWS": 32 if head > 32 else 16, "KEYS": 64, "num_warps": 4}


def _fake_forward(qkv_BTQ, num_heads):
    B, T, Q = qkv_BTQ.shape
    return qkv_BTQ.new_empty((B, T, Q // 3))


def _fake_backward(grad_BTD, qkv_BTQ, num_heads):
    return qkv_BTQ.new_empty(qkv_BTQ.shape)


def _save(ctx, inputs, output):
    qkv_BTQ, ctx.num_heads = inputs
    # No weights and no sums: a program of the backward kernel has all keys at hand, and computes the softmax again.
    ctx.save_for_backward(qkv_BTQ)


def _backward(ctx, grad_BTD):
    return short_attention_grad(grad_BTD, *ctx.saved_tensors, ctx.num_heads), None


short_attention = register(
    "short_attention",
    "(Tensor qkv, int num_heads) -> Tensor",
    short_attention_forward,
    _fake_forward,
    gradient=(_save, _backward),
)
short_attention_grad = register(
    "short_attention_grad",
    "(Tensor grad, Tensor qkv, int num_heads) -> Tensor",
    short_attention_backward,
    _fake_backward,
)


def launches() -> list[Launch]:
    real, limits = [(50, 64), (197, 8), (257, 8)], [(80, 128), (128, 32), (128, 64), (512, 16)]
    sizes = {
        "bf16": [*real, (17, 8), (65, 64), (99, 64), (50, 96), (400, 16), *limits],
        "fp16": [*real, *limits],
        "fp32": [(50, 64), (128, 16), (64, 32), (64, 64)],
    }

    def call(tokens: int, head: int, dtype: torch.dtype):
        qkv_BTQ = empty(8, tokens, 3 * 16 * head, dtype=dtype)
        short_attention_backward(short_attention_forward(qkv_BTQ, 16), qkv_BTQ, 16)

    def call_with(tokens: int, head: int, tiles: dict[str, Tiles]):
        shape, dtype = (8, tokens, 3 * 16 * head), torch.float16
        qkv_BTQ, grad_BTD = empty(*shape, dtype=dtype), empty(8, tokens, 16 * head, dtype=dtype)
        _prepared_forward(qkv_BTQ.shape, 16, dtype, *tiles[FORWARD].values())(qkv_BTQ)
        if BACKWARD in tiles:
            _prepared_backward(qkv_BTQ.shape, 16, dtype, *tiles[BACKWARD].values())(grad_BTD, qkv_BTQ)

    own = [
        Launch(f"T{tokens} d{head}", name, partial(call, tokens, head, STORAGE[name]))
        for name in sizes
        for tokens, head in sizes[name]
    ]
    # In fp16 alone, which only the recorded table has: compiling takes long.
    return own + [
        Launch(f"T{tokens} d{head} {name}", "fp16", partial(call_with, tokens, head, tiles))
        for tokens, head in real[:2]
        for name, tiles in alternatives(tokens, head, 2).items()
    ]
