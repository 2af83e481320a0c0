"""mask_indices: noise [B,L] -> two index tables [B,L].  Recipes draw the noise in fp32."""

import torch

from bench.kernels.suite import Size
from mimir_fast.kernels import mask_indices
from tests.support.cases import DTYPES, Case


def cases(size: Size, dtype: str) -> list[Case]:
    def draw(device: torch.device) -> dict:
        return {"noise_BL": torch.rand(size.B, size.L, device=device).to(DTYPES[dtype])}

    return [Case("mask_indices", {"B": size.B, "L": size.L}, dtype, draw, mask_indices, usual="fp32")]
