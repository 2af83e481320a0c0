"""mask_indices in Triton: the rank of an entry is the number of entries before it, so nothing is sorted."""

import torch
import triton
import triton.language as tl
from mimir_fast.kernels.launch import STORAGE, Launch, empty
from mimir_fast.kernels.registration import register
from torch import Tensor

BLOCK = 256  # entries ranked by a program: a whole row up to 256 patches
CHUNK = 16  # entries they are compared with at a time
NUM_WARPS = 8  # 16 comparisons per thread and chunk


@triton.jit
def _mask_indices_kernel(
    noise, ids_keep, ids_restore, mask, stride_b, stride_l, L, K, BLOCK: tl.constexpr, CHUNK: tl.constexpr
):
    """formula      rank[b,l] = #{j: noise[b,j] < noise[b,l], or equal and j < l}; ids_restore = rank, mask = rank >= K,
                 ids_keep[b,rank] = l where rank < K
    shapes       noise [B,L] with strides -> ids_keep [B,K], ids_restore [B,L], mask [B,L] contiguous
    dtypes       any float storage, compared as it is; indices int64; mask in the noise's dtype
    bytes        noise twice (the second time from L1), every output once
    determinism  exact; a NaN counts as +inf, so that ranks are a permutation whatever the noise
    source       rank by counting
    """
    image = tl.program_id(0).to(tl.int64)
    place_R = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    noise += image * stride_b
    mine_R = tl.load(noise + place_R.to(tl.int64) * stride_l, mask=place_R < L, other=0)
    mine_R = tl.where(mine_R == mine_R, mine_R, float("inf"))
    before_RC = tl.zeros([BLOCK, CHUNK], tl.int32)
    for start in range(0, L, CHUNK):
        place_C = start + tl.arange(0, CHUNK)
        other_C = tl.load(noise + place_C.to(tl.int64) * stride_l, mask=place_C < L, other=0)
        other_C = tl.where(other_C == other_C, other_C, float("inf"))
        earlier_RC = (other_C[None, :] == mine_R[:, None]) & (place_C[None, :] < place_R[:, None])
        before_RC += (((other_C[None, :] < mine_R[:, None]) | earlier_RC) & (place_C < L)[None, :]).to(tl.int32)
    rank_R = tl.sum(before_RC, axis=1)
    tl.store(ids_restore + image * L + place_R, rank_R.to(tl.int64), mask=place_R < L)
    tl.store(mask + image * L + place_R, (rank_R >= K).to(mask.dtype.element_ty), mask=place_R < L)
    tl.store(ids_keep + image * K + rank_R, place_R.to(tl.int64), mask=(place_R < L) & (rank_R < K))


def mask_indices_forward(noise_BL: Tensor, keep: int) -> tuple[Tensor, Tensor, Tensor]:
    """ids_keep [B,K], ids_restore [B,L], mask [B,L]."""
    ids_keep_BK, ids_restore_BL, mask_BL = _fake(noise_BL, keep)
    B, L = noise_BL.shape
    block = min(BLOCK, triton.next_power_of_2(L))
    _mask_indices_kernel[(B, triton.cdiv(L, block))](
        noise_BL, ids_keep_BK, ids_restore_BL, mask_BL, *noise_BL.stride(), L, keep, block, CHUNK, num_warps=NUM_WARPS
    )
    return ids_keep_BK, ids_restore_BL, mask_BL


def _fake(noise_BL, keep):
    B, L = noise_BL.shape
    indices = [noise_BL.new_empty((B, n), dtype=torch.int64) for n in (keep, L)]
    return *indices, noise_BL.new_empty((B, L))


mask_indices = register(
    "mask_indices", "(Tensor noise, SymInt keep) -> (Tensor, Tensor, Tensor)", mask_indices_forward, _fake
)


def launches() -> list[Launch]:
    narrow = frozenset(["_mask_indices_kernel"])  # one entry per thread, 18 bytes per patch in all
    sizes = {"L<=64": (64, 16), "L<=256": (196, 49), "L>256": (576, 144)}
    return [
        Launch(config, dtype, lambda L=L, K=K, d=d: mask_indices_forward(empty(8, L, dtype=d), K), narrow)
        for config, (L, K) in sizes.items()
        for dtype, d in STORAGE.items()
    ]
