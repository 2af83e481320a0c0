"""XCiT's two kinds of block: patches by cross-covariance and local convolutions, and a class token that asks all patches.

Shapes: B batch, T tokens, K kept patches, L patches, N heads, S = D/N numbers per head, D width.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mimir_fast.kernels import mlp
from mimir_fast.kernels.mlp.op import supported
from mimir_fast.models.families.cait.attention import ClassAttention
from mimir_fast.models.families.xcit.layers import BatchNorm, Statistics
from mimir_fast.models.layers import MLP, check_heads

EPS = 1e-6


class Grid(NamedTuple):
    """Where tokens [B,T,D] are: on a square grid of this side, all of it in raster order, or at places.

    ids    [B,K] places of the tokens in raster order; None: T = side * side
    kept   [B,1,side,side], 1 there and 0 elsewhere
    """

    side: int
    ids: Tensor | None = None
    kept: Tensor | None = None

    def spread(self, x_BTD: Tensor) -> Tensor:
        """[B,T,D] -> [B,D,side,side], zero where no token is."""
        if self.ids is not None:
            zeros = x_BTD.new_zeros(len(x_BTD), self.side**2, x_BTD.shape[2])
            x_BTD = zeros.scatter(1, self.ids[:, :, None].expand_as(x_BTD), x_BTD)
        return x_BTD.transpose(1, 2).unflatten(2, (self.side, self.side))

    def collect(self, x_BDHW: Tensor) -> Tensor:
        """The tokens again."""
        x_BLD = x_BDHW.flatten(2).transpose(1, 2)
        return x_BLD if self.ids is None else x_BLD.gather(1, self.ids[:, :, None].expand(-1, -1, x_BLD.shape[2]))


class CrossCovariance(nn.Module):
    """Attention among channels: [B,T,D] -> [B,T,D], whatever the tokens' order.

    Source: El-Nouby et al., XCiT: Cross-Covariance Image Transformers, 2021.
    """

    def __init__(self, width: int, num_heads: int):
        super().__init__()
        check_heads(width, num_heads)
        self.num_heads = num_heads
        # In place of 1/sqrt(S): products of normalised rows are cosines, and every head learns its softmax's sharpness.
        self.temperature = nn.Parameter(torch.ones(num_heads, 1, 1))
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x_BTD: Tensor) -> Tensor:
        """Every head's queries and keys are divided by their length over all tokens."""
        # Tokens last: a row is a channel over all tokens, and the weights are [S,S] whatever the number of tokens.
        q, k, v = self.qkv(x_BTD).unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 4, 1).unbind()
        scores_BNSS = F.normalize(q, dim=-1).to(v.dtype) @ F.normalize(k, dim=-1).to(v.dtype).transpose(2, 3)
        weights_BNSS = (scores_BNSS * self.temperature).softmax(dim=-1).to(v.dtype)
        return self.proj((weights_BNSS @ v).permute(0, 3, 1, 2).flatten(2))


class LocalPatches(nn.Module):
    """Two depthwise convolutions over the grid of tokens, with batch normalisation between.

    Where some patches are removed, the convolutions see zeros in their places, and the normalisation counts the others alone.
    """

    def __init__(self, width: int):
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1, groups=width)
        self.bn = BatchNorm(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, groups=width)

    def forward(self, x_BTD: Tensor, grid: Grid) -> tuple[Tensor, Statistics | None]:
        """[B,T,D] -> the same, and what the running statistics follow."""
        # GELU before the normalisation, the order of El-Nouby et al.'s code.
        x_BDHW, batch = self.bn.normalised(F.gelu(self.conv1(grid.spread(x_BTD))), grid.kept)
        # What the first convolution leaves beside the kept patches must not come back through the second.
        x_BDHW = x_BDHW if grid.kept is None else x_BDHW * grid.kept
        return grid.collect(self.conv2(x_BDHW)), batch


class CrossCovarianceBlock(nn.Module):
    """x + gamma1 * attention(norm1 x), then + gamma3 * local(norm3 x), then + gamma2 * mlp(norm2 x)."""

    def __init__(self, width: int, num_heads: int, mlp_ratio: float, eta: float, mlp: str = "auto"):
        super().__init__()
        # The order of the state dict is part of the checkpoint format.
        self.gamma1, self.gamma3, self.gamma2 = (nn.Parameter(torch.full((width,), float(eta))) for _ in range(3))
        self.norm1 = nn.LayerNorm(width, eps=EPS)
        self.attn = CrossCovariance(width, num_heads)
        self.norm3 = nn.LayerNorm(width, eps=EPS)
        self.local_mp = LocalPatches(width)
        self.norm2 = nn.LayerNorm(width, eps=EPS)
        hidden = int(width * mlp_ratio)
        self.mlp = MLP(width, hidden)
        # The triton kernel wants widths that its tiles divide.
        self.mlp_kernels = mlp if supported(width, hidden) else "reference"

    def forward(self, x_BTD: Tensor, grid: Grid, keep_3B: Tensor | None = None) -> tuple[Tensor, Statistics | None]:
        """Tokens [B,T,D] -> the same, and what the running statistics of `local_mp` follow: not here, for this pass may be
        computed twice.

        keep: each image's factors of the three additions, for stochastic depth.
        """
        of_attention, of_local, of_mlp = (None, None, None) if keep_3B is None else keep_3B.unbind()
        x_BTD = plus(x_BTD, self.gamma1 * self.attn(self.normed(self.norm1, x_BTD)), of_attention)
        local_BTD, batch = self.local_mp(self.normed(self.norm3, x_BTD), grid)
        x_BTD = plus(x_BTD, self.gamma3 * local_BTD, of_local)
        fc1, fc2 = self.mlp.fc1, self.mlp.fc2
        hidden = mlp(self.normed(self.norm2, x_BTD), fc1.weight, fc1.bias, fc2.weight, self.mlp_kernels) + fc2.bias
        return plus(x_BTD, self.gamma2 * hidden, of_mlp), batch

    def normed(self, norm: nn.LayerNorm, x_BTD: Tensor) -> Tensor:
        """In the type in which the linear layers compute."""
        return norm(x_BTD.to(norm.weight.dtype)).to(self.mlp.fc1.weight.dtype)


def plus(x_BTD: Tensor, delta_BTD: Tensor, keep_B: Tensor | None) -> Tensor:
    """The sum in x's type; keep: each image's factor of what is added."""
    delta_BTD = delta_BTD if keep_B is None else delta_BTD * keep_B[:, None, None]
    return (x_BTD + delta_BTD).to(x_BTD.dtype)


class ClassBlock(nn.Module):
    """Class token and patches [B,1+T,D] -> the same: the class token asks all, every patch adds its own normalised value.

    Patches never see the class token.  tokens_norm: whether norm2 is for all tokens or for the class token alone.
    """

    def __init__(self, width: int, num_heads: int, mlp_ratio: float, eta: float, tokens_norm: bool):
        super().__init__()
        check_heads(width, num_heads)
        self.tokens_norm = tokens_norm
        self.gamma1, self.gamma2 = (nn.Parameter(torch.full((width,), float(eta))) for _ in range(2))
        self.norm1 = nn.LayerNorm(width, eps=EPS)
        self.attn = ClassAttention(width, num_heads)
        self.norm2 = nn.LayerNorm(width, eps=EPS)
        self.mlp = MLP(width, int(width * mlp_ratio))

    def forward(self, x_BTD: Tensor) -> Tensor:
        """In the parameters' type between the linear layers."""
        normed_BTD = self.norm1(x_BTD.to(self.norm1.weight.dtype))
        asked_B1D = self.attn(normed_BTD.to(self.attn.q.weight.dtype))
        x_BTD = x_BTD + self.gamma1 * torch.cat([asked_B1D.to(normed_BTD.dtype), normed_BTD[:, 1:]], dim=1)
        cls_B1D, patches_BTD = x_BTD[:, :1], x_BTD[:, 1:]
        # In place of x and not beside it: the sum below begins with the normalised value, as in El-Nouby et al.'s code.
        cls_B1D = self.norm2(cls_B1D)
        patches_BTD = self.norm2(patches_BTD) if self.tokens_norm else patches_BTD
        hidden = F.gelu(self.mlp.fc1(cls_B1D.to(self.mlp.fc1.weight.dtype)))
        # Patches are added to themselves, as in the published models.
        return torch.cat([cls_B1D + self.gamma2 * self.mlp.fc2(hidden), 2 * patches_BTD], dim=1)
