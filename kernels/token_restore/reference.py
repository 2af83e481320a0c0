"""token_restore in plain PyTorch."""

import torch
from torch import Tensor


def token_restore(tokens_BKE: Tensor, mask_token_E: Tensor, pos_embed_LE: Tensor, ids_shuffle_BL: Tensor) -> Tensor:
    """See op.py: tokens [B,1+K,E], mask_token [E], pos_embed [1+L,E], ids_shuffle [B,L] -> [B,1+L,E]."""
    B, L = ids_shuffle_BL.shape
    # Rounded to the tokens' dtype before the addition, as the kernel does.
    masked_BME = mask_token_E.to(tokens_BKE.dtype).expand(B, L + 1 - tokens_BKE.shape[1], -1)
    # Row 0 of the position table belongs to the class token.
    places_BL = torch.cat([ids_shuffle_BL.new_zeros(B, 1), 1 + ids_shuffle_BL], dim=1)
    return torch.cat([tokens_BKE, masked_BME], dim=1) + pos_embed_LE[places_BL]
