"""patch_gather in plain PyTorch."""

import torch
from torch import Tensor

from mimir_fast.kernels._shared.bytes import as_floats


def patch_gather(
    images_BCHW: Tensor, ids_keep_BK: Tensor, patch_size: int, offset: float, dtype: torch.dtype
) -> Tensor:
    """See op.py: images [B,C,H,W], ids_keep [B,K] -> [B,K,C*p*p] in (channel, row, column) order."""
    B, C, H, W = images_BCHW.shape
    p = patch_size
    grid_BLP = images_BCHW.reshape(B, C, H // p, p, W // p, p).permute(0, 2, 4, 1, 3, 5).reshape(B, -1, C * p * p)
    patches_BKP = grid_BLP.gather(1, ids_keep_BK[:, :, None].expand(-1, -1, C * p * p))
    # Converted after the gather, so that only kept patches are.
    patches_BKP = as_floats(patches_BKP)
    # In fp32 at least: the offset is there to save digits that 16 bits would lose.
    if offset:
        patches_BKP = patches_BKP.to(torch.promote_types(patches_BKP.dtype, torch.float32)) - offset
    return patches_BKP.to(dtype)
