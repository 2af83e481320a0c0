"""Gated positional self-attention: content and position each say where a head looks, a gate per head weighs the two.

Shapes: B batch, T tokens, N heads, d numbers per head, D = N*d.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mimir_fast.models.attention import attention, check_backend
from mimir_fast.models.layers import check_heads


def raster(side: int, device: torch.device | None = None) -> Tensor:
    """Columns and rows of a square grid's places in raster order, int32 [2,side*side]."""
    places = torch.arange(side**2, dtype=torch.int32, device=device)
    return torch.stack([places % side, places // side])


def offsets(places: Tensor) -> Tensor:
    """Columns and rows [2,...,T] -> (dx, dy, dx*dx + dy*dy) of every query and key, key minus query, [3,...,T,T].

    Whole numbers, so that no precision in which a model may compute rounds them.
    """
    dx, dy = (places[..., None, :] - places[..., :, None]).unbind()
    return torch.stack([dx, dy, dx * dx + dy * dy])


class PositionalScore(nn.Module):
    """Where each head looks: the softmax over keys of a linear function of (dx, dy, dx*dx + dy*dy)."""

    # No linear layer, of which a 16-bit copy would compute: squares of distances need the digits.
    def __init__(self, num_heads: int):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(num_heads, 3))
        self.bias = nn.Parameter(torch.zeros(num_heads))

    def forward(self, offsets: Tensor) -> Tensor:
        """See `offsets`: [3,...,T,T] -> [...,N,T,T], at least in fp32."""
        dtype = torch.promote_types(self.weight.dtype, torch.float32)
        dx, dy, squared = (t.unsqueeze(-3) for t in offsets)
        w, bias = self.weight.to(dtype)[:, :, None, None], self.bias.to(dtype)[:, None, None]
        # Term by term and no matrix product, which a GPU would round to tf32.
        return (w[:, 0] * dx + w[:, 1] * dy + w[:, 2] * squared + bias).softmax(dim=-1)


class GatedAttention(nn.Module):
    """(1 - g) softmax(q k^T / sqrt(d)) v + g P v, with a gate g and positional weights P for each head.

    P does not depend on the tokens: where all images have theirs in the same places it is computed once for the batch.
    Raises ValueError where the heads do not divide the width.
    Source: d'Ascoli et al., ConViT: Improving Vision Transformers with Soft Convolutional Inductive Biases, 2021.
    """

    def __init__(self, width: int, num_heads: int, bias: bool = True, backend: str = "auto"):
        super().__init__()
        check_heads(width, num_heads)
        check_backend(backend)
        self.num_heads, self.backend = num_heads, backend
        # The order of the state dict is part of the checkpoint format.
        self.gating_param = nn.Parameter(torch.ones(num_heads))
        self.qk = nn.Linear(width, 2 * width, bias=bias)
        self.v = nn.Linear(width, width, bias=bias)
        self.proj = nn.Linear(width, width)
        self.pos_proj = PositionalScore(num_heads)

    def forward(self, x_BTD: Tensor, query_start: int, offsets: Tensor) -> Tensor:
        """[B,T,D] -> [B,T-query_start,D], without the projection's bias.

        query_start   all tokens are keys and values, only tokens[query_start:] are queries
        offsets       [3,T,T] of all images, or [3,B,T,T]: see the function of that name
        """
        # Rows q, k, v, each head-major: the packed layout of all attention backends, of short_attention too.
        weight = torch.cat([self.qk.weight, self.v.weight])
        bias = None if self.v.bias is None else torch.cat([self.qk.bias, self.v.bias])
        qkv_BTQ, heads = F.linear(x_BTD, weight, bias), (self.num_heads, -1)
        content = attention(qkv_BTQ, self.num_heads, query_start, self.backend).unflatten(2, heads)
        v_BTNd = qkv_BTQ.unflatten(2, (3, *heads))[:, :, 2]
        weights = self.pos_proj(offsets)[..., query_start:, :].to(v_BTNd.dtype)
        positional = torch.einsum("nij,bjnd->bind" if weights.ndim == 3 else "bnij,bjnd->bind", weights, v_BTNd)
        gate_N1 = self.gating_param.sigmoid()[:, None]
        # The original divides the mixed weights by their sum, which is 1 up to rounding.
        mixed = (1 - gate_N1) * content + gate_N1 * positional
        return F.linear(mixed.flatten(2).to(content.dtype), self.proj.weight)

    @torch.no_grad()
    def look_around(self, strength: float, draw: Callable[[Tensor], Tensor]) -> None:
        """Start as a convolution: v the identity, each head at a place of its own around the query.

        strength   how sharply; draw initialises the positional weights of heads beyond the largest square number of them
        """
        nn.init.eye_(self.v.weight)
        # sigmoid(1) = 0.73: position outweighs content when training begins.
        nn.init.ones_(self.gating_param)
        draw(self.pos_proj.weight)
        side = math.isqrt(self.num_heads)
        # An even number of places a side has none in the middle: heads then look half a patch beside the patches.
        centre = side // 2 if side % 2 else (side - 1) / 2
        for head in range(side**2):
            across, down = head // side - centre, head % side - centre
            # 2 a dx + 2 b dy - dx^2 - dy^2 = a^2 + b^2 - (dx - a)^2 - (dy - b)^2: with a across and b down
            # the softmax peaks at the key that is (a, b) away from the query.
            self.pos_proj.weight[head] = strength * torch.tensor([2 * across, 2 * down, -1.0])
