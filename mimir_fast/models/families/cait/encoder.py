"""CaiT's encoder: patches alone through the trunk, then a class token that only asks them.

Shapes: B batch, L patches, K kept patches, P = C*p*p numbers per patch, D width.
"""

from typing import Any

import torch
from torch import Tensor, nn

from mimir_fast.models.compat import checked
from mimir_fast.models.encoder import Encoder, added
from mimir_fast.models.families.cait.attention import EPS, ClassAttentionBlock, TalkingHeadsBlock
from mimir_fast.models.layers import PatchEmbed, check_counts


class CaiTEncoder(Encoder):
    """Patches through blocks of talking heads, then the class token through `depth_token_only` layers that read them.

    init_values      every gamma when training begins; mlp_ratio_token_only: of the class token's layers
    compat           "original": layer decay as in the original, see the family's record; computed alike
    computing        further arguments of Encoder
    The weights are as torch's modules draw them; the subclass initialises them once all its modules are there.
    Raises ValueError where sizes do not fit together.
    Source: Touvron et al., Going deeper with Image Transformers, 2021.
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
        init_values: float,
        depth_token_only: int,
        mlp_ratio_token_only: float,
        *,
        compat: str | None = None,
        attention: str = "auto",
        mlp: str = "auto",
        **computing: Any,
    ):
        super().__init__(img_size, patch_size, in_chans, **computing)
        check_counts(depth=depth, depth_token_only=depth_token_only)
        # Heads mix their scores: no backend of --attention computes that, whichever is asked for.
        self.compat, self._block = checked(compat), (mlp_ratio, init_values, self.kernels, mlp)
        # The order of the state dict is part of the checkpoint format: parameters in this order, then modules in theirs.
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, self.num_patches, embed_dim))
        self.patch_embed = PatchEmbed(patch_size, in_chans, embed_dim)
        self.blocks = self.make_blocks(depth, embed_dim, num_heads)
        sizes = (embed_dim, num_heads, mlp_ratio_token_only, init_values)
        self.blocks_token_only = nn.ModuleList([ClassAttentionBlock(*sizes) for _ in range(depth_token_only)])
        self.norm = nn.LayerNorm(embed_dim, eps=EPS)

    def make_blocks(self, depth: int, width: int, num_heads: int) -> nn.ModuleList:
        """Blocks of talking heads."""
        return nn.ModuleList([TalkingHeadsBlock(width, num_heads, *self._block) for _ in range(depth)])

    def run(self, patches: Tensor, ids_keep: Tensor | None = None, factors: Tensor | None = None) -> Tensor:
        """Patches [B,K,P] and where they were [B,K] (None: all, in raster order) through all layers: normalised tokens
        [B,1+K,D], class token first.  factors: see `drop_factors`."""
        tokens = self.patch_embed(patches)
        tokens = tokens + (self.pos_embed if ids_keep is None else self.pos_embed[0][ids_keep])
        stream = self.run_blocks(self.residual(tokens), factors)
        # The class token's layers normalise patches as they are: nothing may be left to add.
        tokens = added(stream, None if factors is None else factors[-1])
        cls_token = self.cls_token.expand(len(tokens), -1, -1)
        for block in self.blocks_token_only:
            cls_token = block(cls_token, tokens)
        tokens = torch.cat([cls_token, tokens.to(cls_token.dtype)], dim=1)
        # In the parameters' type, fp32, whatever the blocks compute in: the penalty takes distances of these numbers.
        return self.norm(tokens.to(self.norm.weight.dtype))
