"""mask_indices in plain PyTorch."""

import torch
from torch import Tensor


def mask_indices(noise_BL: Tensor) -> tuple[Tensor, Tensor]:
    """See op.py: noise [B,L] -> ids_shuffle [B,L], ids_restore [B,L]."""
    ids_shuffle_BL = noise_BL.masked_fill(noise_BL.isnan(), torch.inf).argsort(dim=1, stable=True)
    # Scattering positions inverts a permutation without a second sort.
    positions_BL = torch.arange(noise_BL.shape[1], device=noise_BL.device).expand_as(ids_shuffle_BL)
    return ids_shuffle_BL, torch.empty_like(ids_shuffle_BL).scatter_(1, ids_shuffle_BL, positions_BL)
