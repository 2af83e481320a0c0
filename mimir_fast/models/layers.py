"""Building blocks that families of models share.  Shapes: B batch, T tokens, D width, N heads."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mimir_fast.kernels import add_layer_norm, mlp
from mimir_fast.kernels.mlp.op import supported
from mimir_fast.models.attention import check_backend, projected_attention


class Attention(nn.Module):
    """Multi-head self-attention over [B,T,D] with a packed qkv projection (rows ordered q, k, v, each head-major)."""

    def __init__(self, width: int, num_heads: int, backend: str = "auto", bias: bool = True):
        super().__init__()
        check_heads(width, num_heads)
        check_backend(backend)
        self.num_heads, self.backend = num_heads, backend
        self.qkv = nn.Linear(width, 3 * width, bias=bias)
        self.proj = nn.Linear(width, width)

    def forward(self, x_BTD: Tensor, query_start: int = 0) -> Tensor:
        """[B,T,D] -> [B,T-query_start,D], without the projection's bias.

        All tokens are keys and values; only tokens[query_start:] are queries.
        """
        qkv = self.qkv
        mixed_BTD = projected_attention(x_BTD, qkv.weight, qkv.bias, self.num_heads, query_start, self.backend)
        return F.linear(mixed_BTD, self.proj.weight)


class MLP(nn.Module):
    """The parameters of the operation mlp: D -> hidden -> D."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)


class Block(nn.Module):
    """Pre-norm Transformer block: x + attention(norm(x)), then x + mlp(norm(x)), exact GELU.

    The second addition is left to whoever normalises next, and so is the bias of the branch's last linear layer.
    kernels: implementation of add_layer_norm; mlp: implementation of the operation mlp.
    attn: a family's own attention in place of `Attention`, called like it, with `given` beside.
    """

    def __init__(
        self,
        width: int,
        num_heads: int,
        mlp_ratio: float,
        attention: str = "auto",
        kernels: str = "auto",
        mlp: str = "auto",
        attn: nn.Module | None = None,
    ):
        super().__init__()
        self.kernels = kernels
        # 1e-6 as in the original; torch's own default is 1e-5.
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attn: Any = Attention(width, num_heads, attention) if attn is None else attn
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
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
        *given: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """x [B,T,D], delta [B,T,D] and delta_bias [D] to be added to it -> the same three for tokens[query_start:].

        keep: each image's factors of both additions made here, of delta and of the attention, for stochastic depth;
        given: further arguments of the attention.
        """
        of_delta_B, of_attention_B = (None, None) if keep_2B is None else keep_2B.unbind()
        of_delta_B = None if delta_BTD is None else of_delta_B
        x_BTD, normed_BTD = add_and_norm(x_BTD, delta_BTD, delta_bias_D, self.norm1, self.kernels, keep_B=of_delta_B)
        # Tokens that are no queries end here: attention had them as keys and values, an MLP works on each alone.
        delta_BTD, bias_D = self.attn(normed_BTD, query_start, *given), self.attn.proj.bias
        x_BTD, normed_BTD = add_and_norm(
            x_BTD[:, query_start:], delta_BTD, bias_D, self.norm2, self.kernels, keep_B=of_attention_B
        )
        fc1, fc2 = self.mlp.fc1, self.mlp.fc2
        return x_BTD, mlp(normed_BTD, fc1.weight, fc1.bias, fc2.weight, self.mlp_kernels), fc2.bias


def add_and_norm(
    x_BTD: Tensor,
    delta_BTD: Tensor | None,
    delta_bias_D: Tensor | None,
    norm: nn.LayerNorm,
    kernels: str,
    out_dtype: torch.dtype | None = None,
    keep_B: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """add_layer_norm with a module's parameters; the bias is rounded to delta's type, as the linear layer would do it."""
    # Added in the kernel and not by the linear layer: one pass over the tokens less.
    bias_D = None if delta_bias_D is None or delta_BTD is None else delta_bias_D.to(delta_BTD.dtype)
    return add_layer_norm(x_BTD, delta_BTD, bias_D, norm.weight, norm.bias, norm.eps, out_dtype, kernels, keep_B)


class PatchEmbed(nn.Module):
    """The patch projection; a convolution's parameters, applied to patches already cut out."""

    def __init__(self, patch_size: int, channels: int, width: int):
        super().__init__()
        # For the original's names and shapes, [D,C,p,p]; its forward pass is never called.
        self.proj = nn.Conv2d(channels, width, kernel_size=patch_size, stride=patch_size)

    def forward(self, patches_BKP: Tensor) -> Tensor:
        """[B,K,C*p*p] in (channel, row, column) order -> [B,K,D], in the patches' precision whatever autocast says.

        bf16 would round an adversarial perturbation of 8/255 by up to 6 %; tf32 keeps it, and its gradient's range.
        """
        with torch.autocast(patches_BKP.device.type, enabled=False):
            return F.linear(patches_BKP, self.proj.weight.flatten(1), self.proj.bias)


def sincos_table(width: int, grid: int) -> Tensor:
    """Fixed 2-D sine-cosine positions, [1 + grid*grid, width] fp32, the class token's row zero.

    The first half of the width encodes the column, the second the row; each half is [sin, cos] at frequencies
    10000^(-k/(width/4)).  Computed in float64.  Raises ValueError unless width is a multiple of 4.
    """
    if width % 4:
        raise ValueError(f"embed_dim: the sine-cosine position table needs a multiple of 4, got {width}")
    frequencies = 10000.0 ** (-torch.arange(width // 4, dtype=torch.float64) / (width / 4))
    angles = torch.arange(grid, dtype=torch.float64)[:, None] * frequencies
    # [grid, width/2]
    axis = torch.cat([angles.sin(), angles.cos()], dim=1)
    # Columns before rows, as in the original: trained parameters belong to this order.
    columns, rows = axis.repeat(grid, 1), axis.repeat_interleave(grid, dim=0)
    table = torch.cat([columns, rows], dim=1)
    return torch.cat([torch.zeros(1, width, dtype=torch.float64), table]).float()


def resize_table(table: Tensor, old: int, side: int) -> Tensor:
    """Positional table [1,old*old,D] of a square grid -> [1,side*side,D], bicubic, rounded once."""
    # In fp32 also where the file holds 16 bits: rounded once, at the end.
    patches = table.float().unflatten(1, (old, old)).permute(0, 3, 1, 2)
    patches = F.interpolate(patches, size=(side, side), mode="bicubic", align_corners=False)
    return patches.flatten(2).transpose(1, 2).to(table.dtype)


def init_xavier(module: nn.Module) -> None:
    """Initialise a linear layer as the original's masked autoencoders do: Xavier-uniform weight, zero bias; nothing else."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def init_trunc_normal(module: nn.Module) -> None:
    """Initialise a linear layer as the original's classifiers do: truncated normal weight of deviation 0.02, zero bias."""
    if isinstance(module, nn.Linear):
        # Cut at -2 and 2, by torch's default as by timm's: 100 deviations away, so that in effect nothing is cut.
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def check_heads(width: int, num_heads: int) -> None:
    """Raises ValueError unless the heads divide the width."""
    if num_heads < 1 or width % num_heads:
        raise ValueError(f"num_heads: {num_heads} does not divide the width {width}")


def check_counts(**counts: int) -> None:
    """Raises ValueError, which names it, for a number of blocks, classes and the like below 1."""
    for name, count in counts.items():
        if count < 1:
            raise ValueError(f"{name}: expected 1 or more, got {count}")


def check_images(name: str, images: Tensor, channels: int, side: int) -> None:
    """Raises ValueError unless images are [B,channels,side,side]; `name` is the argument's."""
    if images.ndim != 4 or images.shape[1:] != (channels, side, side):
        raise ValueError(f"{name}: expected [B,{channels},{side},{side}], got {tuple(images.shape)}")
