"""mlp in plain PyTorch."""

import torch.nn.functional as F
from torch import Tensor


def mlp(x: Tensor, weight1_FD: Tensor, bias1_F: Tensor, weight2_DF: Tensor) -> Tensor:
    """See op.py: x [...,D] -> [...,D]."""
    return F.linear(F.gelu(F.linear(x, weight1_FD, bias1_F)), weight2_DF)
