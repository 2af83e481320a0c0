"""CaiT's two kinds of block: patches with talking heads, and the class token alone, which asks all of them.

Shapes: B batch, T tokens, R of them queries, N heads, d numbers per head, D = N*d.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mimir_fast.kernels import mlp
from mimir_fast.kernels._shared.registration import choose
from mimir_fast.kernels.mlp.op import supported
from mimir_fast.models.layers import MLP, add_and_norm, check_heads

EPS = 1e-6
# Numbers per head that torch's flash attention takes, at most.
FLASH_WIDTH = 256


class TalkingHeads(nn.Module):
    """Self-attention whose heads mix their scores before the softmax and their weights after it.

    kernels: "reference" computes by the definition everywhere; else on CUDA in 16 bits, where no token is wider than the
    sequence is long, as an attention whose heads share keys and values (`folded`).
    Source: Shazeer et al., Talking-Heads Attention, 2020; Touvron et al., Going deeper with Image Transformers, 2021.
    """

    def __init__(self, width: int, num_heads: int, kernels: str = "auto"):
        super().__init__()
        check_heads(width, num_heads)
        self.num_heads, self.kernels = num_heads, kernels
        # The order of the state dict is part of the checkpoint format.
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.proj_l = nn.Linear(num_heads, num_heads)
        self.proj_w = nn.Linear(num_heads, num_heads)

    def forward(self, x_BTD: Tensor, query_start: int = 0) -> Tensor:
        """[B,T,D] -> the heads' outputs [B,T-query_start,D], before the projection; only tokens[query_start:] are queries."""
        q_BTD, k_BTD, v_BTD = self.qkv(x_BTD).unflatten(2, (3, -1)).unbind(2)
        q_BRD, (T, D) = q_BTD[:, query_start:], x_BTD.shape[1:]
        if choose(self.kernels, q_BRD) == "triton" and q_BRD.dtype.itemsize == 2 and min(T, FLASH_WIDTH) >= D:
            return self.folded(q_BRD, k_BTD, v_BTD)
        q, k, v = (t.unflatten(2, (self.num_heads, -1)).transpose(1, 2) for t in (q_BRD, k_BTD, v_BTD))
        # Stored, and by no fused attention: heads mix before the softmax and again after it.
        scores_BNRT = (q * q.shape[-1] ** -0.5) @ k.transpose(2, 3)
        weights_BNRT = talk(self.proj_w, talk(self.proj_l, scores_BNRT).softmax(dim=-1))
        return (weights_BNRT.to(v.dtype) @ v).transpose(1, 2).flatten(2)

    def folded(self, q_BRD: Tensor, k_BTD: Tensor, v_BTD: Tensor) -> Tensor:
        """The same numbers, [B,R,D], with heads mixed in the queries and in the outputs: D per head and query in memory in
        place of T, and a fused attention between."""
        heads = (self.num_heads, -1)
        # sum_b l[a,b] q_b k_b^T is a product of all D numbers, once q has head a's factors in it.
        factors_ND = self.proj_l.weight.repeat_interleave(q_BRD.shape[2] // self.num_heads, dim=1)
        asked_B1QD = (q_BRD[:, None] * factors_ND[:, None]).flatten(1, 2)[:, None]
        # All heads have the same keys and values: to the kernel they are further queries of a single head.
        scale = (q_BRD.shape[2] // self.num_heads) ** -0.5
        told_B1QD = F.scaled_dot_product_attention(asked_B1QD, k_BTD[:, None], v_BTD[:, None], scale=scale)
        told_BNRNd = told_B1QD.squeeze(1).unflatten(1, (self.num_heads, -1)).unflatten(3, heads)
        mixed_BRNd = (told_BNRNd * self.proj_w.weight.T[:, None, :, None]).sum(dim=1)
        # proj_l's bias is the same for all keys, which a softmax does not see: its gradient is 0, and not None.
        bias_N = self.proj_w.bias + 0 * self.proj_l.bias
        sums_B1Nd = v_BTD.sum(dim=1, keepdim=True).unflatten(2, heads)
        return (mixed_BRNd + bias_N[:, None] * sums_B1Nd).flatten(2).to(v_BTD.dtype)


def talk(linear: nn.Linear, x_BNRT: Tensor) -> Tensor:
    """A linear layer over the heads."""
    # As a batched product: a plain one would copy x to have the heads last.
    weight = linear.weight.expand(len(x_BNRT), -1, -1)
    return torch.baddbmm(linear.bias[:, None], weight, x_BNRT.flatten(2)).unflatten(2, x_BNRT.shape[2:])


class TalkingHeadsBlock(nn.Module):
    """x + gamma_1 * attention(norm(x)), then x + gamma_2 * mlp(norm(x)); takes and returns what layers.Block does.

    The second addition is left to whoever normalises next, and so is the bias of the branch's last linear layer.
    kernels: implementation of add_layer_norm; mlp: implementation of the operation mlp.
    """

    def __init__(
        self,
        width: int,
        num_heads: int,
        mlp_ratio: float,
        init_values: float,
        kernels: str = "auto",
        mlp: str = "auto",
    ):
        super().__init__()
        self.kernels = kernels
        self.gamma_1 = nn.Parameter(torch.full((width,), float(init_values)))
        self.gamma_2 = nn.Parameter(torch.full((width,), float(init_values)))
        self.norm1 = nn.LayerNorm(width, eps=EPS)
        self.attn = TalkingHeads(width, num_heads, kernels)
        self.norm2 = nn.LayerNorm(width, eps=EPS)
        hidden = int(width * mlp_ratio)
        self.mlp = MLP(width, hidden)
        # The triton kernel wants widths that its tiles divide.
        self.mlp_kernels = mlp if supported(width, hidden) else "reference"

    def forward(
        self,
        x_BTD: Tensor,
        delta_BTD: Tensor | None = None,
        delta_bias_D: Tensor | None = None,
        query_start: int = 0,
        keep_2B: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """x [B,T,D], delta [B,T,D] and delta_bias [D] to be added to it -> the same three for tokens[query_start:].

        keep: each image's factors of both additions made here, of delta and of the attention, for stochastic depth.
        """
        of_delta_B, of_attention_B = (None, None) if keep_2B is None else keep_2B.unbind()
        of_delta_B = None if delta_BTD is None else of_delta_B
        x_BTD, normed_BTD = add_and_norm(x_BTD, delta_BTD, delta_bias_D, self.norm1, self.kernels, keep_B=of_delta_B)
        weight, after = folded(self.gamma_1, self.attn.proj.weight)
        delta_BTD = F.linear(self.attn(normed_BTD, query_start), weight)
        delta_BTD, bias_D = after(delta_BTD), self.gamma_1 * self.attn.proj.bias
        x_BTD, normed_BTD = add_and_norm(
            x_BTD[:, query_start:], delta_BTD, bias_D, self.norm2, self.kernels, keep_B=of_attention_B
        )
        fc1, fc2 = self.mlp.fc1, self.mlp.fc2
        weight, after = folded(self.gamma_2, fc2.weight)
        delta_BTD = after(mlp(normed_BTD, fc1.weight, fc1.bias, weight, self.mlp_kernels))
        return x_BTD, delta_BTD, self.gamma_2 * fc2.bias


def folded(gamma_D: Tensor, weight: Tensor):
    """A linear layer's weight [D,I] with the scale of its outputs in it, and what is left to do to these: usually nothing."""
    # A pass over the tokens less; but 1e-5 of a weight is below what fp16 resolves.
    if weight.dtype == torch.float16:
        return weight, lambda delta: (delta * gamma_D).to(delta.dtype)
    return (gamma_D[:, None] * weight).to(weight.dtype), lambda delta: delta


class ClassAttention(nn.Module):
    """The class token's attention to itself and all patches: u [B,1+T,D] -> [B,1,D]."""

    def __init__(self, width: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.q, self.k, self.v, self.proj = (nn.Linear(width, width) for _ in range(4))

    def forward(self, u_BTD: Tensor) -> Tensor:
        asked = (self.q(u_BTD[:, :1]), self.k(u_BTD), self.v(u_BTD))
        heads = (t.unflatten(2, (self.num_heads, -1)).transpose(1, 2) for t in asked)
        return self.proj(F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2))


class ClassAttentionBlock(nn.Module):
    """The class token [B,1,D] and patches [B,T,D] -> the class token; patches stay as they are."""

    def __init__(self, width: int, num_heads: int, mlp_ratio: float, init_values: float):
        super().__init__()
        self.gamma_1 = nn.Parameter(torch.full((width,), float(init_values)))
        self.gamma_2 = nn.Parameter(torch.full((width,), float(init_values)))
        self.norm1 = nn.LayerNorm(width, eps=EPS)
        self.attn = ClassAttention(width, num_heads)
        self.norm2 = nn.LayerNorm(width, eps=EPS)
        self.mlp = MLP(width, int(width * mlp_ratio))

    def forward(self, cls_B1D: Tensor, x_BTD: Tensor) -> Tensor:
        cls_B1D = cls_B1D + self.gamma_1 * self.attn(self.norm1(torch.cat([cls_B1D, x_BTD], dim=1)))
        return cls_B1D + self.gamma_2 * self.mlp.fc2(F.gelu(self.mlp.fc1(self.norm2(cls_B1D))))
