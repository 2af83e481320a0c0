"""patch_gather: the kept patches of a batch, and the gradient image.  Recipes store images in fp32."""

import torch

from bench.kernels.suite import Size
from mimir_fast.kernels import patch_gather
from tests.support.cases import DTYPES, Case, random_order


def cases(size: Size, dtype: str) -> list[Case]:
    def draw(device: torch.device) -> dict:
        images = torch.rand(size.B, 3, size.side, size.side, device=device).to(DTYPES[dtype])
        ids_keep = random_order(size.B, size.L, device)[:, : size.K]
        return {"images_BCHW": images.requires_grad_(), "ids_keep_BK": ids_keep, "patch_size": size.p}

    shape = {"B": size.B, "side": size.side, "p": size.p, "K": size.K}
    return [Case("patch_gather", shape, dtype, draw, patch_gather, usual="fp32")]
