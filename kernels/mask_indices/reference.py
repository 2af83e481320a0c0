"""mask_indices in plain PyTorch."""

import torch
from torch import Tensor


def mask_indices(noise_BL: Tensor, keep: int) -> tuple[Tensor, Tensor, Tensor]:
    """See op.py: noise [B,L] -> ids_keep [B,K], ids_restore [B,L], mask [B,L]."""
    ids_BL = noise_BL.argsort(dim=1, stable=True)
    positions_BL = torch.arange(noise_BL.shape[1], device=noise_BL.device).expand_as(ids_BL)
    ids_restore_BL = torch.empty_like(ids_BL).scatter_(1, ids_BL, positions_BL)  # the inverse permutation
    return ids_BL[:, :keep].contiguous(), ids_restore_BL, (ids_restore_BL >= keep).to(noise_BL.dtype)
