"""token_restore in plain PyTorch."""

import torch
from torch import Tensor


def token_restore(tokens_BKE: Tensor, mask_token_E: Tensor, pos_embed_LE: Tensor, ids_restore_BL: Tensor) -> Tensor:
    """See op.py: tokens [B,1+K,E], mask_token [E], pos_embed [1+L,E], ids_restore [B,L] -> [B,1+L,E]."""
    B, L = ids_restore_BL.shape
    K, E = tokens_BKE.shape[1] - 1, tokens_BKE.shape[2]
    masked_BME = mask_token_E.to(tokens_BKE.dtype).expand(B, L - K, E)
    ranked_BLE = torch.cat([tokens_BKE[:, 1:], masked_BME], dim=1)
    patches_BLE = ranked_BLE.gather(1, ids_restore_BL[:, :, None].expand(-1, -1, E))
    return torch.cat([tokens_BKE[:, :1], patches_BLE], dim=1) + pos_embed_LE
