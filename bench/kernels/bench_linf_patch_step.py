"""linf_patch_step: one step of the attack.  Images and the visible patches' gradient are fp32, predictions 16-bit."""

import torch
from torch import Tensor

from bench.kernels.suite import Size
from mimir_fast.kernels import linf_bounds, linf_patch_step
from tests.support.cases import DTYPES, Case, random_order

EPS = 8 / 255
FLIPPED = 1e-3  # share of pixels whose gradient may be so close to zero that rounding decides its sign


def few_signs_flipped(value: Tensor, eager: Tensor, truth: Tensor) -> str:
    """All pixels right but for some whose gradient's sign is rounding; NaN counts as wrong."""
    right = (value.double() - truth).abs() <= torch.finfo(value.dtype).eps * 4
    share = 1 - right.double().mean().item()
    return "" if share <= FLIPPED else f"{share:.2%} of the pixels are wrong, {FLIPPED:.2%} may be"


def cases(size: Size, dtype: str) -> list[Case]:
    def draw(device: torch.device) -> dict:
        images = torch.rand(size.B, 3, size.side, size.side, device=device)
        return {
            "images_BCHW": images,
            "adv_BCHW": (images + EPS * (2 * torch.rand_like(images) - 1)).clamp(0, 1),
            "grad_visible_BKP": torch.randn(size.B, size.K, size.P, device=device),
            "pred_BMP": torch.randn(size.B, size.M, size.P, device=device).to(DTYPES[dtype]),
            "ids_restore_BL": random_order(size.B, size.L, device),
            "bounds_4C": linf_bounds(EPS, 10 / 255, 0.0, 1.0, 3, device),
            "patch_size": size.p,
            "norm_pix_loss": True,
        }

    shape = {"B": size.B, "side": size.side, "p": size.p, "K": size.K}
    return [Case("linf_patch_step", shape, dtype, draw, linf_patch_step, judge=few_signs_flipped)]
