"""short_attention in plain PyTorch."""

import torch
import torch.nn.functional as F
from torch import Tensor


def short_attention(qkv_BTQ: Tensor, num_heads: int, query_start: int = 0, bias_Q: Tensor | None = None) -> Tensor:
    """See op.py: qkv [B,T,3*N*d] -> [B,T-query_start,N*d]; computes in the storage dtype, autocast or not."""
    B, T, Q = qkv_BTQ.shape
    if bias_Q is not None:
        # Adds 0, and has the gradient.
        qkv_BTQ = qkv_BTQ + (bias_Q - bias_Q.detach()).to(qkv_BTQ.dtype)
    q, k, v = qkv_BTQ.view(B, T, 3, num_heads, Q // (3 * num_heads)).permute(2, 0, 3, 1, 4)
    with torch.autocast(qkv_BTQ.device.type, enabled=False):
        mixed_BNTd = F.scaled_dot_product_attention(q[:, :, query_start:], k, v)
    return mixed_BNTd.transpose(1, 2).reshape(B, T - query_start, Q // 3)
