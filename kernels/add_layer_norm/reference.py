"""add_layer_norm in plain PyTorch."""

import torch
import torch.nn.functional as F
from torch import Tensor


def add_layer_norm(
    x: Tensor,
    delta: Tensor | None,
    delta_bias: Tensor | None,
    weight_D: Tensor,
    bias_D: Tensor,
    eps: float,
    out_dtype: torch.dtype,
    keep_B: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """See op.py: x, delta [...,D], delta_bias, weight, bias [D], keep [B] -> sum in x's dtype, normalised in out_dtype."""
    # At least fp32; fp64 arguments, with which the kernel is compared, stay fp64.
    wide = torch.promote_types(torch.promote_types(x.dtype, weight_D.dtype), torch.float32)
    with torch.autocast(x.device.type, enabled=False):
        if delta is not None:
            added = delta.to(wide) if delta_bias is None else delta.to(wide) + delta_bias.to(wide)
            if keep_B is not None:
                added = added * keep_B.to(wide).view(-1, *(1,) * (x.ndim - 1))
            # Rounded to storage first: the statistics are those of the sum that the next layer reads.
            x = (x.to(wide) + added).to(x.dtype)
        return x, F.layer_norm(x.to(wide), weight_D.shape, weight_D.to(wide), bias_D.to(wide), eps).to(out_dtype)
