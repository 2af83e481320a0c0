"""What Swin's stages are made of.  Shapes: B batch, T tokens, D width, N heads, d numbers per head, G groups, S slots."""

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mimir_fast.models.families.swin.windows import Grid, Regroup, attention_mask, relative_index
from mimir_fast.models.layers import Block, PatchEmbed, add_and_norm, check_heads


class NormedPatchEmbed(PatchEmbed):
    """The patch projection, then LayerNorm."""

    def __init__(self, patch_size: int, channels: int, width: int):
        super().__init__(patch_size, channels, width)
        self.norm = nn.LayerNorm(width, eps=1e-6)

    def forward(self, patches_BKP: Tensor) -> Tensor:
        """[B,K,C*p*p] in (channel, row, column) order -> [B,K,D]."""
        return self.norm(super().forward(patches_BKP))


@torch.library.custom_op("mimir_fast::sum_by_entry", mutates_args=())
def sum_by_entry(grads: Tensor, entry: Tensor, entries: int) -> Tensor:
    """Sums of grads [...,N] by entry [...], below `entries`: [entries,N], added up in a fixed order."""
    grads, entry = grads.flatten(0, -2), entry.flatten().long()
    if grads.device.type == "cpu":
        # index_put adds in several threads, in whatever order they come.
        return torch.stack([entry.bincount(head, entries) for head in grads.unbind(1)], dim=1)
    # Sorted by entry, where compiled code would add atomically.
    return grads.new_zeros(entries, grads.shape[1]).index_put_((entry,), grads, accumulate=True)


@sum_by_entry.register_fake
def _(grads, entry, entries):
    return grads.new_empty(entries, grads.shape[-1])


class Entries(torch.autograd.Function):
    """table[entry]: [E,N], int [...] -> [...,N]; the gradient of an entry is a sum in a fixed order."""

    @staticmethod
    def forward(ctx, table: Tensor, entry: Tensor) -> Tensor:
        ctx.save_for_backward(entry)
        ctx.entries = len(table)
        return table[entry]

    @staticmethod
    def backward(ctx, grads: Tensor) -> tuple[Tensor, None]:
        (entry,) = ctx.saved_tensors
        return sum_by_entry(grads, entry, ctx.entries), None


class WindowAttention(nn.Module):
    """Self-attention within windows, with a number per head and relative position added to the scores.

    window   its side w; the table has an entry for every row and column that query and key may be apart
    Raises ValueError where the heads do not divide the width.
    Source: Liu et al., Swin Transformer: Hierarchical Vision Transformer using Shifted Windows, 2021.
    """

    relative_position_index: Tensor

    def __init__(self, width: int, num_heads: int, window: int, bias: bool = True):
        super().__init__()
        check_heads(width, num_heads)
        self.num_heads = num_heads
        # The order of the state dict is part of the checkpoint format.
        self.relative_position_bias_table = nn.Parameter(torch.zeros((2 * window - 1) ** 2, num_heads))
        # For the files alone, which others load strictly: attention takes the positions of the tokens that are there.
        self.register_buffer("relative_position_index", relative_index(window))
        self.qkv = nn.Linear(width, 3 * width, bias=bias)
        self.proj = nn.Linear(width, width)

    def forward(
        self,
        x_BTD: Tensor,
        query_start: int,
        slots: Tensor | None,
        places: Tensor | None,
        entry: Tensor,
        inside: Tensor,
        outside: Tensor,
    ) -> Tensor:
        """[B,T,D] -> [B,T,D], without the projection's bias; the fields of Windows."""
        qkv_BTQ = self.qkv(x_BTD)
        if slots is not None:
            # After the projection, not before it: empty slots would be projected as well.
            qkv_BTQ = Regroup.apply(qkv_BTQ, slots, places)
        G, S = entry.shape[:2]
        # Groups stand beside the heads, so that the batch shares one bias.
        qkv = qkv_BTQ.unflatten(2, (3, self.num_heads, -1)).unflatten(1, (G, S)).permute(3, 0, 1, 4, 2, 5)
        q, k, v = qkv.flatten(2, 3).unbind()
        bias = self.bias(entry, inside, outside).to(q.dtype)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias[None])
        out = out.unflatten(1, (G, self.num_heads)).transpose(2, 3).flatten(3).flatten(1, 2)
        if slots is not None:
            # Before the projection, for the same reason.
            out = Regroup.apply(out, places, slots)
        return F.linear(out, self.proj.weight)

    def bias(self, entry: Tensor, inside: Tensor, outside: Tensor) -> Tensor:
        """What is added to the scores: [G*N,S,S]."""
        entries = Entries.apply(self.relative_position_bias_table, entry)
        scores = torch.where(inside[..., None], entries, outside[..., None]).permute(0, 3, 1, 2)
        # The fused kernels of scaled_dot_product_attention want neighbouring keys next to each other.
        return scores.flatten(0, 1).contiguous()


class SwinBlock(Block):
    """A Transformer block whose attention is within the windows of a grid of tokens.

    mask     whether a buffer holds the original's mask of dense moved windows: for the files alone
    Arguments not named here are those of Block.
    """

    def __init__(
        self,
        grid: Grid,
        width: int,
        num_heads: int,
        mlp_ratio: float,
        qkv_bias: bool = True,
        mask: bool = False,
        kernels: str = "auto",
        mlp: str = "auto",
    ):
        attn = WindowAttention(width, num_heads, grid.window, qkv_bias)
        super().__init__(width, num_heads, mlp_ratio, kernels=kernels, mlp=mlp, attn=attn)
        if mask and grid.offset:
            # The block's own and not its attention's: files call it layers.S.blocks.B.attn_mask.
            self.register_buffer("attn_mask", attention_mask(grid.side, grid.window, grid.window - grid.offset))


class PatchMerging(nn.Module):
    """Four neighbouring tokens into one of twice the width."""

    def __init__(self, width: int, kernels: str = "auto"):
        super().__init__()
        self.kernels = kernels
        # Made before the normalisation that it comes after: the order of the original's files.
        self.reduction = nn.Linear(4 * width, 2 * width, bias=False)
        self.norm = nn.LayerNorm(4 * width, eps=1e-6)

    def forward(self, x_BTD: Tensor, delta_BTD: Tensor, bias_D: Tensor, keep_B: Tensor | None = None) -> Tensor:
        """Tokens and what is still to be added to them, children next to each other -> [B,T/4,2*D]; keep: see `Block`."""
        x, delta = (tensor.unflatten(1, (-1, 4)).flatten(2) for tensor in (x_BTD, delta_BTD))
        # The pending bias is one token's; four tokens are normalised as one row.
        return self.reduction(add_and_norm(x, delta, bias_D.repeat(4), self.norm, self.kernels, keep_B=keep_B)[1])


class Stage(nn.Module):
    """Blocks of one width, and the merging that ends all stages but the last."""

    def __init__(self, blocks: Iterable[SwinBlock], downsample: PatchMerging | None):
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.downsample = downsample
