"""Gated positional self-attention: content and position each say where a head looks, a gate per head weighs the two.

Shapes: B batch, T tokens, N heads, d numbers per head, D = N*d.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mimir_fast.kernels._shared.registration import choose
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
        return weights_of(self.weight, self.bias, offsets)

    def times(self, factor_N: Tensor, offsets: Tensor, dtype: torch.dtype) -> Tensor:
        """The same times a factor of each head, in another type, which is all that is kept for the backward pass."""
        return ScaledWeights.apply(self.weight, self.bias, factor_N, offsets, dtype)


def weights_of(weight_N3: Tensor, bias_N: Tensor, offsets: Tensor) -> Tensor:
    """See PositionalScore."""
    dtype = torch.promote_types(weight_N3.dtype, torch.float32)
    dx, dy, squared = (t.unsqueeze(-3) for t in offsets)
    w, bias = weight_N3.to(dtype)[:, :, None, None], bias_N.to(dtype)[:, None, None]
    # Term by term and no matrix product, which a GPU would round to tf32.
    return (w[:, 0] * dx + w[:, 1] * dy + w[:, 2] * squared + bias).softmax(dim=-1)


class ScaledWeights(torch.autograd.Function):
    """factor[:, None, None] * weights_of(weight, bias, offsets) in `dtype`; the gradient is taken from that result."""

    @staticmethod
    def forward(
        ctx, weight_N3: Tensor, bias_N: Tensor, factor_N: Tensor, offsets: Tensor, dtype: torch.dtype
    ) -> Tensor:
        out = (factor_N[:, None, None] * weights_of(weight_N3, bias_N, offsets)).to(dtype)
        ctx.save_for_backward(out, factor_N, offsets)
        return out

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        out, factor_N, offsets = ctx.saved_tensors
        precise = torch.promote_types(factor_N.dtype, torch.float32)
        out, grad = out.to(precise), grad.to(precise)
        over = (*range(out.ndim - 3), -2, -1)
        # Sums over keys of weight times gradient, which the softmax subtracts.
        mean = (out * grad).sum(dim=-1, keepdim=True) / factor_N[:, None, None]
        of_score = out * (grad - mean)
        of_weight = torch.stack([(of_score * t.unsqueeze(-3)).sum(dim=over) for t in offsets], dim=1)
        # A bias is the same for all keys of a head: the softmax does not see it.
        return of_weight, torch.zeros_like(factor_N), mean.sum(dim=over), None, None


class GatedAttention(nn.Module):
    """(1 - g) softmax(q k^T / sqrt(d)) v + g P v, with a gate g and positional weights P for each head.

    P does not depend on the tokens: where all images have theirs in the same places it is computed once for the batch.
    kernels: unless "reference", in bf16 on CUDA the gate is in P and in the projection (`folded`).
    Raises ValueError where the heads do not divide the width.
    Source: d'Ascoli et al., ConViT: Improving Vision Transformers with Soft Convolutional Inductive Biases, 2021.
    """

    def __init__(self, width: int, num_heads: int, bias: bool = True, backend: str = "auto", kernels: str = "auto"):
        super().__init__()
        check_heads(width, num_heads)
        check_backend(backend)
        self.num_heads, self.backend, self.kernels = num_heads, backend, kernels
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
        # fp16 does not hold the odds of every gate.
        if choose(self.kernels, x_BTD) == "triton" and v_BTNd.dtype == torch.bfloat16:
            return self.folded(content, v_BTNd, query_start, offsets)
        positional = mixed_by(self.pos_proj(offsets)[..., query_start:, :].to(v_BTNd.dtype), v_BTNd)
        gate_N1 = self.gating_param.sigmoid()[:, None]
        # The original divides the mixed weights by their sum, which is 1 up to rounding.
        mixed = (1 - gate_N1) * content + gate_N1 * positional
        return F.linear(mixed.flatten(2).to(content.dtype), self.proj.weight)

    def folded(self, content_BRNd: Tensor, v_BTNd: Tensor, query_start: int, offsets: Tensor) -> Tensor:
        """The same [B,R,D] as (1 - g) (content + g / (1 - g) P v): the second factor in P, the first in the projection, whose
        gradients need no pass over the tokens."""
        odds_N, rest_N = self.gating_param.exp(), (-self.gating_param).sigmoid()
        weights = self.pos_proj.times(odds_N, offsets, v_BTNd.dtype)[..., query_start:, :]
        mixed = (content_BRNd + mixed_by(weights, v_BTNd)).flatten(2)
        factors_D = rest_N.repeat_interleave(content_BRNd.shape[-1])
        return F.linear(mixed, (self.proj.weight * factors_D).to(mixed.dtype))

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


def mixed_by(weights: Tensor, v_BTNd: Tensor) -> Tensor:
    """Weights [N,R,T] of all images, or [B,N,R,T] -> weights v, [B,R,N,d]."""
    return torch.einsum("nij,bjnd->bind" if weights.ndim == 3 else "bnij,bjnd->bind", weights, v_BTNd)
