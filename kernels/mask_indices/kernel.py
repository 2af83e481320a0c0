"""mask_indices in Triton, by counting: the rank of an entry is the number of entries before it, so nothing is sorted."""

from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from mimir_fast.kernels._shared.launch import FUSED, STORAGE, Launch, Prepared, empty, memoised
from mimir_fast.kernels._shared.registration import register

# Entries that a program ranks: a whole row, up to 256 patches.
BLOCK = 256
# Entries that they are compared with at a time.
CHUNK = 16
# 16 comparisons per thread and chunk.
NUM_WARPS = 8


@triton.jit
def _mask_indices_kernel(
    noise, ids_shuffle, ids_restore, stride_b, stride_l, L, BLOCK: tl.constexpr, CHUNK: tl.constexpr
):
    """formula      rank[b,l] = #{j: noise[b,j] < noise[b,l], or equal and j < l}; ids_restore = rank,
                 ids_shuffle[b,rank] = l
    shapes       noise [B,L] with strides -> ids_shuffle [B,L], ids_restore [B,L] contiguous
    dtypes       any float storage, compared as it is; indices int64
    bytes        noise twice (the second time from L1), every output once
    determinism  exact; a NaN counts as +inf, so that ranks are a permutation whatever the noise
    source       rank by counting
    """
    image = tl.program_id(0).to(tl.int64)
    place_R = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    noise += image * stride_b
    mine_R = tl.load(noise + place_R.to(tl.int64) * stride_l, mask=place_R < L, other=0)
    # A NaN equals nothing, itself included: without this several entries would have one rank and others none.
    mine_R = tl.where(mine_R == mine_R, mine_R, float("inf"))
    before_RC = tl.zeros([BLOCK, CHUNK], tl.int32)
    for start in range(0, L, CHUNK):
        place_C = start + tl.arange(0, CHUNK)
        other_C = tl.load(noise + place_C.to(tl.int64) * stride_l, mask=place_C < L, other=0)
        other_C = tl.where(other_C == other_C, other_C, float("inf"))
        # Equal noise is ranked by place: the order of a stable sort.
        earlier_RC = (other_C[None, :] == mine_R[:, None]) & (place_C[None, :] < place_R[:, None])
        before_RC += (((other_C[None, :] < mine_R[:, None]) | earlier_RC) & (place_C < L)[None, :]).to(tl.int32)
    rank_R = tl.sum(before_RC, axis=1)
    tl.store(ids_restore + image * L + place_R, rank_R.to(tl.int64), mask=place_R < L)
    tl.store(ids_shuffle + image * L + rank_R, place_R.to(tl.int64), mask=place_R < L)


def mask_indices_forward(noise_BL: Tensor) -> tuple[Tensor, Tensor]:
    """ids_shuffle [B,L], ids_restore [B,L]."""
    ids_shuffle_BL, ids_restore_BL = _prepared(noise_BL.shape, noise_BL.stride())(noise_BL)
    return ids_shuffle_BL, ids_restore_BL


@memoised
def _prepared(shape: torch.Size, strides: tuple[int, int]) -> Prepared:
    B, L = shape
    block = min(BLOCK, triton.next_power_of_2(L))
    grid, options = (B, triton.cdiv(L, block)), {"BLOCK": block, "CHUNK": CHUNK, "num_warps": NUM_WARPS, **FUSED}
    return Prepared(_mask_indices_kernel, grid, *strides, L, results=[(shape, torch.int64)] * 2, **options)


def _fake(noise_BL):
    return tuple(noise_BL.new_empty(noise_BL.shape, dtype=torch.int64) for _ in range(2))


mask_indices = register("mask_indices", "(Tensor noise) -> (Tensor, Tensor)", mask_indices_forward, _fake)


def launches() -> list[Launch]:
    # One entry per thread: 18 bytes per patch in all are not worth wider accesses.
    narrow = frozenset(["_mask_indices_kernel"])
    sizes = {"L<=64": 64, "L<=256": 196, "L>256": 576}
    return [
        Launch(config, dtype, partial(mask_indices_forward, empty(8, L, dtype=d)), narrow)
        for config, L in sizes.items()
        for dtype, d in STORAGE.items()
    ]
