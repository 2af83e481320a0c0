"""linf_start in Triton: noise from a counter-based generator, added and clamped in one pass."""

import math
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from mimir_fast.kernels._shared.bytes import float_of
from mimir_fast.kernels._shared.launch import STORAGE, Launch, Prepared, empty, memoised
from mimir_fast.kernels._shared.pixels import pixels
from mimir_fast.kernels._shared.registration import register

# Counters per program; Philox gives four numbers for each.
BLOCK = 256
NUM_WARPS = 4
# A NaN pixel stays NaN: without this tl.clamp would turn it into a bound.
NAN = tl.constexpr(tl.PropagateNan.ALL)


@triton.jit
def _linf_start_kernel(images, bounds, seed, start, n, plane, C: tl.constexpr, BLOCK: tl.constexpr):
    """formula      start = clip(x + eps * (2u - 1), lo, hi); u of element n: word n % 4 of Philox block n // 4, as [0,1)
    shapes       images, start [B,C,H,W] contiguous, n numbers, plane = H*W; bounds [4,C]; seed [] int64
    dtypes       any storage, uint8 divided by 255, fp32 arithmetic; start in the images' dtype, fp32 for uint8
    bytes        images and start once
    determinism  exact: a function of seed and position
    source       Salmon et al., Parallel Random Numbers: As Easy as 1, 2, 3, 2011
    """
    block_N = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    a, b, c, d = tl.rand4x(tl.load(seed), block_N)
    # Interleaved, word w of counter i is element 4i + w.
    uniform_N = tl.interleave(tl.interleave(a, c), tl.interleave(b, d))
    index_N = tl.program_id(0).to(tl.int64) * (4 * BLOCK) + tl.arange(0, 4 * BLOCK)
    channel_N = (index_N // plane % C).to(tl.int32)
    eps_N = tl.zeros([4 * BLOCK], tl.float32)
    lo_N = tl.zeros([4 * BLOCK], tl.float32)
    hi_N = tl.zeros([4 * BLOCK], tl.float32)
    for channel in tl.static_range(C):
        eps_N = tl.where(channel_N == channel, tl.load(bounds + channel), eps_N)
        lo_N = tl.where(channel_N == channel, tl.load(bounds + 2 * C + channel), lo_N)
        hi_N = tl.where(channel_N == channel, tl.load(bounds + 3 * C + channel), hi_N)
    start_N = tl.clamp(pixels(images, index_N, index_N < n) + eps_N * (2 * uniform_N - 1), lo_N, hi_N, NAN)
    tl.store(start + index_N, start_N.to(start.dtype.element_ty), mask=index_N < n)


def linf_start_forward(images_BCHW: Tensor, bounds_4C: Tensor, seed: Tensor) -> Tensor:
    """The starting point [B,C,H,W], contiguous."""
    images_BCHW = images_BCHW.contiguous()
    launch = _prepared(images_BCHW.shape, float_of(images_BCHW))
    (start_BCHW,) = launch(images_BCHW, bounds_4C.contiguous(), seed)
    return start_BCHW


@memoised
def _prepared(shape: torch.Size, dtype: torch.dtype) -> Prepared:
    _, C, H, W = shape
    n, results = math.prod(shape), [(shape, dtype)]
    # Without fused multiply-adds every product and sum is rounded, as in the reference: both give the same bits.
    options = {"C": C, "BLOCK": BLOCK, "num_warps": NUM_WARPS, "enable_fp_fusion": False}
    return Prepared(_linf_start_kernel, (triton.cdiv(n, 4 * BLOCK),), n, H * W, results=results, **options)


linf_start = register(
    "linf_start",
    "(Tensor images, Tensor bounds, Tensor seed) -> Tensor",
    linf_start_forward,
    lambda images, bounds, seed: images.new_empty(images.shape, dtype=float_of(images)),
)


def launches() -> list[Launch]:
    def call(dtype: torch.dtype):
        linf_start_forward(empty(8, 3, 64, 64, dtype=dtype), empty(4, 3), empty(dtype=torch.int64))

    # A thread's 8 numbers are 8 bytes in uint8.
    narrow = frozenset(["_linf_start_kernel"])
    floats = [Launch("", dtype, partial(call, d)) for dtype, d in STORAGE.items()]
    return [*floats, Launch("", "uint8", partial(call, torch.uint8), narrow)]
