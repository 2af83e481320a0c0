"""XCiT's encoder: a stem over whole images, blocks over patches, then a class token.

Shapes: B batch, C channels, H W sides, L patches, K kept patches, D width.
"""

import math
from collections.abc import Iterable
from typing import Any, cast

import torch
from torch import Tensor, nn

from mimir_fast.config.choices import ORIGINAL
from mimir_fast.models.compat import checked
from mimir_fast.models.encoder import Encoder, recomputed
from mimir_fast.models.families.xcit.attention import EPS, ClassBlock, CrossCovarianceBlock, Grid
from mimir_fast.models.families.xcit.layers import ConvolutionalStem, FourierPositions
from mimir_fast.models.layers import check_counts


class XCiTEncoder(Encoder):
    """Images through a convolutional stem, their patches through blocks, then a class token through `cls_attn_layers` of its
    own.

    patch_size     8 or 16, the stem's
    eta            every gamma when training begins; tokens_norm: see ClassBlock
    compat         "original": the stem sees removed patches, and local convolutions take the kept ones, in whatever order they
                   come, for a compact grid; None: the stem sees zeros there, and kept patches are where they are in the image
    computing      further arguments of Encoder
    The weights are as torch's modules draw them; the subclass initialises them once all its modules are there.
    Raises ValueError where sizes do not fit together.
    Source: El-Nouby et al., XCiT: Cross-Covariance Image Transformers, 2021.
    """

    def __init__(
        self,
        img_size: int,
        patch_size: int,
        in_chans: int,
        embed_dim: int,
        depth: int,
        num_heads: int,
        mlp_ratio: float,
        eta: float,
        tokens_norm: bool,
        cls_attn_layers: int,
        *,
        compat: str | None = None,
        attention: str = "auto",
        mlp: str = "auto",
        **computing: Any,
    ):
        super().__init__(img_size, patch_size, in_chans, **computing)
        check_counts(depth=depth, cls_attn_layers=cls_attn_layers)
        # Channels attend, not tokens: no backend of --attention computes that, whichever is asked for.
        self.compat, self._block, self._mlp = checked(compat), (mlp_ratio, eta), mlp
        self._class_block = (cls_attn_layers, tokens_norm)
        # The order of the state dict is part of the checkpoint format; the subclass adds `norm` where its own order has it.
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.patch_embed = ConvolutionalStem(patch_size, in_chans, embed_dim)
        self.pos_embed = FourierPositions(embed_dim, self.grid)
        self.blocks = self.make_blocks(depth, embed_dim, num_heads)
        self.cls_attn_blocks = self.make_class_blocks(embed_dim, num_heads)
        self.norm: nn.LayerNorm

    def make_blocks(self, depth: int, width: int, num_heads: int) -> nn.ModuleList:
        """Blocks of patches."""
        return nn.ModuleList([CrossCovarianceBlock(width, num_heads, *self._block, self._mlp) for _ in range(depth)])

    def make_class_blocks(self, width: int, num_heads: int) -> nn.ModuleList:
        """Blocks of the class token."""
        layers, tokens_norm = self._class_block
        return nn.ModuleList([ClassBlock(width, num_heads, *self._block, tokens_norm) for _ in range(layers)])

    def run(self, images: Tensor, ids_keep: Tensor | None = None, factors: Tensor | None = None) -> Tensor:
        """Images [B,C,H,W], of whose patches ids_keep [B,K] are kept (None: all), through all layers: normalised tokens
        [B,1+K,D], class token first.  factors: see `drop_factors`."""
        tokens = self.patch_embed(images.contiguous()) + self.pos_embed()
        if ids_keep is not None:
            # Positions are in already: every kept token has that of its own place.
            tokens = tokens.gather(1, ids_keep[:, :, None].expand(-1, -1, tokens.shape[2]))
        # Without row 0, which is for an addition pending before the first block: these blocks leave none pending.
        rows = None if factors is None else factors[1:].unflatten(0, (len(self.blocks), -1))
        tokens = through(
            self.blocks, self.residual(tokens), self._places(ids_keep), rows, self.activation_checkpointing
        )
        tokens = torch.cat([self.cls_token.expand(len(tokens), -1, -1).to(tokens.dtype), tokens], dim=1)
        for block in self.cls_attn_blocks:
            tokens = block(tokens)
        # In the parameters' type, fp32, whatever the blocks compute in: the penalty takes distances of these numbers.
        return self.norm(tokens.to(self.norm.weight.dtype))

    def add_norm(self, width: int) -> None:
        """Make the last normalisation."""
        self.norm = nn.LayerNorm(width, eps=EPS)

    def _places(self, ids_keep: Tensor | None) -> Grid:
        if ids_keep is None:
            return Grid(self.grid)
        if self.compat == ORIGINAL:
            # Kept patches in the order of the noise side by side: the original's defect (docs/fidelity.md, D1).
            return Grid(math.isqrt(ids_keep.shape[1]))
        return Grid(self.grid, ids_keep, self.seen(ids_keep).unflatten(1, (1, self.grid, self.grid)))

    def seen(self, ids_keep: Tensor) -> Tensor:
        """[B,L] in the parameters' type: 1 where a patch is kept, 0 elsewhere."""
        zeros = self.cls_token.new_zeros(len(ids_keep), self.num_patches)
        return zeros.scatter(1, ids_keep, 1.0)


def through(
    blocks: Iterable[nn.Module], tokens: Tensor, grid: Grid, rows: Tensor | None = None, recompute: bool = False
) -> Tensor:
    """Tokens [B,T,D] through blocks, whose running statistics follow; rows [depth,3,B]: factors of stochastic depth."""
    for i, block in enumerate(blocks):
        assert isinstance(block, CrossCovarianceBlock)
        given = (tokens, grid, None if rows is None else rows[i])
        tokens, batch = recomputed(block, *given) if recompute else cast(Any, block)(*given)
        block.local_mp.bn.follow(batch)
    return tokens
