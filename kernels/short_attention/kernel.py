"""short_attention in Triton: sizes, launchers, autograd.  Shapes: B batch, T tokens, N heads, d numbers per head, D = N*d.

heads.py            what the kernels share
forward.py          the output, and for long sequences the softmax's log-sum-exp
backward.py         the gradient in qkv, up to MEMORY_BOUND tokens
long_backward.py    the gradient in qkv of more tokens
"""

from functools import partial

import torch
import triton
from torch import Tensor

from mimir_fast.kernels._shared.column_sums import prepared_sums
from mimir_fast.kernels._shared.generation import generation_of
from mimir_fast.kernels._shared.launch import FUSED, STORAGE, Launch, Prepared, empty, memoised, nothing
from mimir_fast.kernels._shared.registration import register
from mimir_fast.kernels._shared.tiles import Tiles, chosen
from mimir_fast.kernels.short_attention.backward import _attend_grad_kernel
from mimir_fast.kernels.short_attention.forward import _attend_kernel
from mimir_fast.kernels.short_attention.heads import columns, heads_per_program, stacked
from mimir_fast.kernels.short_attention.long_backward import _attend_long_grad_kernel
from mimir_fast.kernels.short_attention.tiles import BACKWARD, FORWARD, alternatives

# Up to so many tokens the backward kernel is limited by memory: it reads neither the output nor sums that were kept.
MEMORY_BOUND = 64
# In the order of tiles.py and of the functions that choose them here.
TILES = ("ROWS", "KEYS", "num_warps")


def short_attention_forward(
    qkv_BTQ: Tensor, bias_Q: Tensor | None, num_heads: int, query_start: int
) -> tuple[Tensor, Tensor]:
    """The attention output [B,T-query_start,N*d]; log-sum-exps [B,N,T-query_start] where the backward pass reads them."""
    shape, dtype = qkv_BTQ.shape, qkv_BTQ.dtype
    sizes = chosen(FORWARD, shape[1], shape[2] // 3 // num_heads, dtype).values()
    launch = _prepared_forward(shape, num_heads, query_start, dtype, *sizes)
    out_BRD, lse_BNR = launch(qkv_BTQ.contiguous())
    return out_BRD, nothing(out_BRD) if lse_BNR is None else lse_BNR


@memoised
def _prepared_forward(shape: torch.Size, num_heads: int, query_start: int, dtype: torch.dtype, *sizes: int) -> Prepared:
    """shape: of qkv; sizes: the values of tile sizes that were chosen, none: our own."""
    B, T, Q = shape
    head, queries = Q // 3 // num_heads, T - query_start
    tiles = dict(zip(TILES, sizes)) or forward_tiles(T, head, dtype.itemsize)
    options = {"T": T, "FIRST": query_start, "HEAD": head, **tiles, **FUSED}
    results = [((B, queries, Q // 3), dtype), ((B, num_heads, queries), torch.float32) if T > MEMORY_BOUND else None]
    return Prepared(_attend_kernel, _grid(B, num_heads, head), num_heads, results=results, **options)


def short_attention_backward(
    grad_BRD: Tensor,
    qkv_BTQ: Tensor,
    out_BRD: Tensor | None,
    lse_BNR: Tensor | None,
    num_heads: int,
    query_start: int,
    bias_dtype: torch.dtype | None,
    generation: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Gradient in qkv [B,T,3*N*d], and its sum over images and tokens [3*N*d] in bias_dtype; empty if that is None.

    out, lse      as the forward pass returned them; None where it returned no lse
    generation    for which sizes are chosen, 8 an A100 and 9 an H100; None: of the GPU that holds qkv
    """
    shape, dtype = qkv_BTQ.shape, qkv_BTQ.dtype
    generation = generation or generation_of(qkv_BTQ.device)
    # fp32 products are three tf32 products: their kernels have no registers left for sums.
    with_sums = bias_dtype is not None and dtype.itemsize == 2
    sizes = chosen(BACKWARD, shape[1], shape[2] // 3 // num_heads, dtype).values()
    launch = _prepared_backward(shape, num_heads, query_start, dtype, with_sums, generation, *sizes)
    kept = () if lse_BNR is None else (out_BRD, lse_BNR)
    grad_qkv_BTQ, sums_BQ = launch(grad_BRD.contiguous(), qkv_BTQ.contiguous(), *kept)
    if bias_dtype is None:
        return grad_qkv_BTQ, nothing(grad_qkv_BTQ)
    if not with_sums:
        return grad_qkv_BTQ, grad_qkv_BTQ.sum((0, 1)).to(bias_dtype)
    # The leading 1 is K of column_sums.py: one sum at once.
    return grad_qkv_BTQ, prepared_sums((1, shape[0], shape[2]), (bias_dtype,))(sums_BQ)[0]


@memoised
def _prepared_backward(
    shape: torch.Size,
    num_heads: int,
    query_start: int,
    dtype: torch.dtype,
    with_sums: bool,
    generation: int,
    *sizes: int,
) -> Prepared:
    """sizes: as of _prepared_forward, for sequences of up to MEMORY_BOUND tokens."""
    B, T, Q = shape
    head = Q // 3 // num_heads
    kernel, tiles = _attend_grad_kernel, dict(zip(TILES, sizes)) or backward_tiles(T, head, dtype.itemsize)
    if T > MEMORY_BOUND:
        kernel, tiles = _attend_long_grad_kernel, long_backward_tiles(T, head, dtype.itemsize, generation)
    options = {"T": T, "FIRST": query_start, "HEAD": head, **tiles, **FUSED}
    # 1/sqrt(d) for the gradients in q and k: the factor in the exponent holds a 1/ln 2 beside it, for powers of two.
    numbers = num_heads, head**-0.5
    results = [(shape, dtype), ((B, Q), torch.float32) if with_sums else None]
    return Prepared(kernel, _grid(B, num_heads, head), *numbers, results=results, **options)


def _grid(batch: int, num_heads: int, head: int) -> tuple[int]:
    return (batch * triton.cdiv(num_heads, heads_per_program(head)),)


def forward_tiles(tokens: int, head: int, itemsize: int) -> dict[str, int]:
    """Rows of a tile of queries, keys of a part, and warps: the largest for which no kernel spills registers."""
    # tl.dot takes no side shorter than 16.
    needed = max(16, triton.next_power_of_2(tokens) * stacked(head))
    # fp32 products are three tf32 products, and take three times the registers.
    if itemsize == 4:
        return {"ROWS": min(32, needed), "KEYS": 64, "num_warps": min(4, needed // 8)}
    rows = min(32 if 64 < tokens <= 256 and head <= 16 else 64, needed)
    return {"ROWS": rows, "KEYS": 64, "num_warps": rows // 16}


def backward_tiles(tokens: int, head: int, itemsize: int) -> dict[str, int]:
    """As forward_tiles, for the backward kernel of up to MEMORY_BOUND tokens, which has its keys in one part."""
    keys = max(16, triton.next_power_of_2(tokens))
    if itemsize == 4:
        return {"ROWS": 16, "KEYS": keys, "num_warps": 8 if head > 32 else 4}
    # 16 bytes of a tile for every thread.
    warps = 8 if head > 64 else min(4, keys * columns(head) // 256)
    return {"ROWS": min(64, keys * stacked(head)), "KEYS": keys, "num_warps": warps}


def long_backward_tiles(tokens: int, head: int, itemsize: int, generation: int) -> dict[str, int]:
    """As forward_tiles, for the backward kernel of more tokens; HOIST: keys and values stay in registers as operands."""
    if itemsize == 4:
        return {"ROWS": 16, "KEYS": 64, "HOIST": False, "num_warps": 8, "num_stages": 1}
    if 16 < head <= 32:
        return {"ROWS": 16, "KEYS": 64, "HOIST": False, "num_warps": 4, "num_stages": 1}
    if head > 32:
        if generation >= 9:
            return {"ROWS": 32, "KEYS": 128, "HOIST": False, "num_warps": 8, "num_stages": 2}
        return {"ROWS": 32, "KEYS": 64, "HOIST": True, "num_warps": 8, "num_stages": 1}
    rows, warps = 32 if tokens <= 208 else 16, 4 if tokens <= 272 else 8
    return {"ROWS": rows, "KEYS": 128, "HOIST": True, "num_warps": warps, "num_stages": 2}


def _fake_forward(qkv_BTQ, bias_Q, num_heads, query_start):
    B, T, Q = qkv_BTQ.shape
    kept = (B, num_heads, T - query_start) if T > MEMORY_BOUND else (0,)
    lse_dtype = torch.float32 if T > MEMORY_BOUND else qkv_BTQ.dtype
    return qkv_BTQ.new_empty((B, T - query_start, Q // 3)), qkv_BTQ.new_empty(kept, dtype=lse_dtype)


def _fake_backward(grad_BRD, qkv_BTQ, out_BRD, lse_BNR, num_heads, query_start, bias_dtype):
    grad_qkv_BTQ = qkv_BTQ.new_empty(qkv_BTQ.shape)
    if bias_dtype is None:
        return grad_qkv_BTQ, qkv_BTQ.new_empty(0)
    return grad_qkv_BTQ, qkv_BTQ.new_empty(qkv_BTQ.shape[2], dtype=bias_dtype)


def _save(ctx, inputs, output):
    qkv_BTQ, bias_Q, ctx.num_heads, ctx.query_start = inputs
    out_BRD, lse_BNR = output
    ctx.mark_non_differentiable(lse_BNR)
    ctx.bias_dtype = None if bias_Q is None else bias_Q.dtype
    # Of few tokens no weights and no sums: a program of the backward kernel has all keys, and computes the softmax again.
    ctx.save_for_backward(qkv_BTQ, *((out_BRD, lse_BNR) if qkv_BTQ.shape[1] > MEMORY_BOUND else (None, None)))


def _backward(ctx, grad_BRD, _):
    # bias is no part of the output: its gradient is that of the rows of qkv, to all of which it was added.
    bias_dtype = ctx.bias_dtype if ctx.needs_input_grad[1] else None
    grad_qkv_BTQ, grad_bias_Q = short_attention_grad(
        grad_BRD, *ctx.saved_tensors, ctx.num_heads, ctx.query_start, bias_dtype
    )
    return grad_qkv_BTQ, None if bias_dtype is None else grad_bias_Q, None, None


short_attention = register(
    "short_attention",
    "(Tensor qkv, Tensor? bias, int num_heads, int query_start) -> (Tensor, Tensor)",
    short_attention_forward,
    _fake_forward,
    gradient=(_save, _backward),
)
short_attention_grad = register(
    "short_attention_grad",
    "(Tensor grad, Tensor qkv, Tensor? out, Tensor? lse, int num_heads, int query_start, ScalarType? bias_dtype)"
    " -> (Tensor, Tensor)",
    short_attention_backward,
    _fake_backward,
)


def launches() -> list[Launch]:
    real, limits = [(50, 64), (197, 8), (257, 8), (197, 64)], [(80, 128), (128, 32), (208, 64), (512, 16)]
    sizes = {
        "bf16": [*real, (17, 8), (65, 64), (99, 64), (50, 96), (400, 16), *limits],
        # Its code is that of bf16 but for conversions.
        "fp16": real,
        "fp32": [(50, 64), (128, 16), (64, 32), (64, 64)],
    }

    def call(tokens: int, head: int, dtype: torch.dtype, generation: int):
        """As in training, and as in the attack on a model that does not learn."""
        qkv_BTQ = empty(8, tokens, 3 * 16 * head, dtype=dtype)
        out_BRD, lse_BNR = short_attention_forward(qkv_BTQ, None, 16, 0)
        kept = lse_BNR if tokens > MEMORY_BOUND else None
        for bias_dtype in (dtype, None):
            short_attention_backward(out_BRD, qkv_BTQ, out_BRD, kept, 16, 0, bias_dtype, generation)

    def call_with(tokens: int, head: int, tiles: dict[str, Tiles]):
        shape, dtype = (8, tokens, 3 * 16 * head), torch.float16
        qkv_BTQ, grad_BTD = empty(*shape, dtype=dtype), empty(8, tokens, 16 * head, dtype=dtype)
        _prepared_forward(qkv_BTQ.shape, 16, 0, dtype, *tiles[FORWARD].values())(qkv_BTQ)
        if BACKWARD in tiles:
            _prepared_backward(qkv_BTQ.shape, 16, 0, dtype, True, 9, *tiles[BACKWARD].values())(grad_BTD, qkv_BTQ)

    # It writes 32 numbers per program.
    narrow = frozenset(["_add_partials_kernel"])
    own = [
        Launch(f"T{tokens} d{head}", name, partial(call, tokens, head, STORAGE[name], generation), narrow, archs)
        for name in sizes
        for tokens, head in sizes[name]
        for generation, archs in ((8, (80,)), (9, (90,)))
    ]
    # In fp16 alone, which only the recorded table has: compiling takes long.
    return own + [
        Launch(f"T{tokens} d{head} {name}", "fp16", partial(call_with, tokens, head, tiles), narrow)
        for tokens, head in real[:2]
        for name, tiles in alternatives(tokens, head, 2).items()
    ]
