"""Bicubic, antialiased resampling: Triton building blocks of the crop operations.  No operation of its own.

A tile of results is two products of matrices: rows of pixels times the columns' weights, then the rows' weights times that.
8-bit pixels are exact in fp16; weights are sums of two fp16 numbers, together as good as fp32; sums are fp32.
Shapes: T results of a tile on each side, R and K rows and columns of pixels at a time, S side of the crops.
"""

from collections.abc import Callable
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from mimir_fast.kernels._shared.launch import FUSED, Launch, Prepared, empty, memoised

# Half the width of the filter, in pixels where nothing is reduced.
SUPPORT = tl.constexpr(2.0)
# Results of a program; rows and columns of pixels at a time.  The largest tiles that no register is spilled for.
TILES = {"HEIGHT": 32, "WIDTH": 32, "ROWS": 32, "COLUMNS": 16, "num_warps": 2}


@triton.jit
def tile_of(S, HEIGHT: tl.constexpr, WIDTH: tl.constexpr):
    """This program's image (int64, so that offsets are), and the rows [Y,1] and columns [1,X] of its results."""
    across, down = tl.cdiv(S, WIDTH), tl.cdiv(S, HEIGHT)
    image = (tl.program_id(0) // (across * down)).to(tl.int64)
    y_Y1 = tl.program_id(0) // across % down * HEIGHT + tl.arange(0, HEIGHT)[:, None]
    return image, y_Y1, tl.program_id(0) % across * WIDTH + tl.arange(0, WIDTH)[None, :]


@triton.jit
def side_of(box, extent, S, share):
    """One side of a box: its first pixel, how many it touches, where in these it starts, and the distance of results.

    box      where its start is; its length is two numbers on
    extent   of the plane, in pixels
    share    of a pixel of the box: 0.5 in a plane of half the resolution
    """
    start, length = tl.load(box) * share, tl.load(box + 2) * share
    first = tl.minimum(tl.maximum(tl.floor(start), 0.0), extent.to(tl.float32) - 1.0)
    last = tl.minimum(tl.maximum(tl.ceil(start + length), first + 1.0), extent.to(tl.float32))
    return first.to(tl.int32), (last - first).to(tl.int32), start - first, tl.div_rn(length, S.to(tl.float32))


@triton.jit
def taps_of(results, S, count, begin, scale):
    """First and past the last pixel that a tile's results are made of, so far as both exist."""
    support = SUPPORT * tl.maximum(scale, 1.0)
    lowest, highest = tl.maximum(tl.min(results), 0), tl.minimum(tl.max(results), S - 1)
    low = tl.floor(begin + (lowest + 0.5) * scale - support)
    high = tl.ceil(begin + (highest + 0.5) * scale + support)
    return tl.maximum(low, 0.0).to(tl.int32), tl.minimum(high, count.to(tl.float32)).to(tl.int32)


@triton.jit
def weights_of(pixel, result, count, begin, scale):
    """What pixels contribute to results, not normalised: the cubic filter with a = -0.5, 0 for those past the box."""
    centre = begin + (result + 0.5) * scale
    x = tl.abs(pixel + 0.5 - centre) * tl.div_rn(1.0, tl.maximum(scale, 1.0))
    # (2 - x)^2 (1 - x) / 2 up to 2, and up to 1 the difference to the filter's other piece: no selects.
    far, near = tl.maximum(2.0 - x, 0.0), tl.maximum(1.0 - x, 0.0)
    weight = far * far * (0.5 - 0.5 * x) + near * near * (2.0 * x - 1.0)
    return tl.where(pixel < count, weight, 0.0)


@triton.jit
def total_of(result, count, begin, scale):
    """The sum of all pixels' weights of each result."""
    support = SUPPORT * tl.maximum(scale, 1.0)
    first = tl.maximum(tl.floor(begin + (result + 0.5) * scale - support), 0.0)
    total = tl.zeros(result.shape, tl.float32)
    for tap in range(0, (2.0 * support).to(tl.int32) + 2):
        total += weights_of(first + tap, result, count, begin, scale)
    return total


@triton.jit
def halves(values):
    """fp32 numbers as sums of two fp16 numbers."""
    high = values.to(tl.float16)
    return high, (values - high.to(tl.float32)).to(tl.float16)


@triton.jit
def across(pixels_RK, high_KX, low_KX, sum_RX):
    """The sum, and 8-bit pixels times columns' weights."""
    exact_RK = pixels_RK.to(tl.float16)
    return tl.dot(exact_RK, low_KX, tl.dot(exact_RK, high_KX, sum_RX))


@triton.jit
def down(high_YR, low_YR, levels_RX, sum_YX):
    """The sum, and rows' weights times whole levels 0..255."""
    exact_RX = levels_RX.to(tl.float16)
    return tl.dot(low_YR, exact_RX, tl.dot(high_YR, exact_RX, sum_YX))


@triton.jit
def rounded(values):
    """To whole levels, halves up, clamped to 0..255."""
    return tl.minimum(tl.maximum(tl.floor(values + 0.5), 0.0), 255.0)


@triton.jit
def store(crops, image, channel: tl.constexpr, y_Y1, x_1X, S, levels_YX):
    """One channel's levels to crops [B,3,S,S]: as they are where these are uint8, divided by 255 where they are fp32."""
    place_YX = crops + (3 * image + channel) * S * S + y_Y1 * S + x_1X
    exists_YX = (y_Y1 < S) & (x_1X < S)
    if crops.dtype.element_ty == tl.uint8:
        tl.store(place_YX, levels_YX.to(tl.uint8), mask=exists_YX)
    else:
        # Correctly rounded, as torch divides; Triton's own division is not.
        tl.store(place_YX, tl.div_rn(levels_YX, 255.0), mask=exists_YX)


# The operations' arguments, in their order: the last is what they write.
SCHEMA = "(Tensor packed, Tensor offsets, Tensor sizes, Tensor boxes, Tensor flips, Tensor(a!) crops) -> ()"


def no_result(*arguments) -> None:
    """What an operation gives that writes into its last argument."""


def launch_tiles(kernel: triton.JITFunction, *tensors: Tensor) -> None:
    """Write the crops [B,3,S,S], the last of the operation's arguments, by one program of the kernel per tile."""
    *inputs, crops_BCSS = tensors
    B, _, size, _ = crops_BCSS.shape
    _prepared(kernel, B, size)(*(tensor.contiguous() for tensor in inputs), crops_BCSS)


@memoised
def _prepared(kernel: triton.JITFunction, B: int, size: int) -> Prepared:
    grid = (B * triton.cdiv(size, TILES["HEIGHT"]) * triton.cdiv(size, TILES["WIDTH"]),)
    return Prepared(kernel, grid, size, results=[], **TILES, **FUSED)


def tile_launches(forward: Callable, kernel: str) -> list[Launch]:
    """The launches of a crop operation, for the compile gate."""

    def call(size: int, dtype: torch.dtype):
        integers = empty(8, dtype=torch.int64), empty(8, 2, dtype=torch.int64)
        inputs = empty(1024, dtype=torch.uint8), *integers, empty(8, 4), empty(8, dtype=torch.bool)
        forward(*inputs, empty(8, 3, size, size, dtype=dtype))

    # Its loads are single bytes: pixels are packed without gaps, and boxes begin anywhere.
    narrow = frozenset([kernel])
    return [
        Launch(f"S{size}", kind, partial(call, size, dtype), narrow)
        for size, kind, dtype in (
            (224, "fp32", torch.float32),
            (224, "uint8", torch.uint8),
            (225, "fp32", torch.float32),
        )
    ]
