"""masked_patch_loss: the reconstruction loss and the predictions' gradient.  Images are fp32, predictions 16-bit."""

import torch

from bench.kernels.suite import Size
from mimir_fast.kernels import masked_patch_loss
from tests.support.cases import DTYPES, Case, random_order


def cases(size: Size, dtype: str) -> list[Case]:
    def draw(device: torch.device) -> dict:
        return {
            "pred_BMP": torch.randn(size.B, size.M, size.P, device=device).to(DTYPES[dtype]).requires_grad_(),
            "images_BCHW": torch.rand(size.B, 3, size.side, size.side, device=device),
            "ids_BM": random_order(size.B, size.L, device)[:, size.K :],
            "patch_size": size.p,
            "norm_pix_loss": True,
        }

    shape = {"B": size.B, "side": size.side, "p": size.p, "M": size.M}
    return [Case("masked_patch_loss", shape, dtype, draw, masked_patch_loss)]
