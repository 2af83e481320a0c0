"""token_restore: the decoder's input and its gradient.  The mask token and the position table are fp32."""

import torch

from bench.kernels.suite import Size
from mimir_fast.kernels import token_restore
from tests.support.cases import DTYPES, Case, random_order


def cases(size: Size, dtype: str) -> list[Case]:
    def draw(device: torch.device) -> dict:
        return {
            "tokens_BKE": torch.randn(size.B, 1 + size.K, size.E, device=device).to(DTYPES[dtype]).requires_grad_(),
            "mask_token_E": torch.randn(size.E, device=device).requires_grad_(),
            "pos_embed_LE": torch.randn(1 + size.L, size.E, device=device),
            "ids_shuffle_BL": random_order(size.B, size.L, device),
        }

    shape = {"B": size.B, "L": size.L, "K": size.K, "E": size.E}
    return [Case("token_restore", shape, dtype, draw, token_restore)]
