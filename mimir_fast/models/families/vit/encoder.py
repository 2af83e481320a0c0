"""The Vision Transformer's encoder: a class token, positions that are added to the patches, blocks that are all alike.

Shapes: B batch, L patches, K kept patches, P = C*p*p numbers per patch, D width.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mimir_fast.models.encoder import Encoder
from mimir_fast.models.layers import Block, PatchEmbed, check_counts, sincos_table


class ViTEncoder(Encoder):
    """Patches and a class token through Transformer blocks; the arguments not named here are those of Encoder.

    fixed_positions   the positional table is the sine-cosine one and not trained; else zeros, for the subclass to initialise
    attention         backend by name, see mimir_fast/models/attention.py
    mlp               implementation of the operation mlp, as for kernels
    The weights are as torch's modules draw them; the subclass initialises them once all its modules are there.
    Raises ValueError where sizes do not fit together.
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
        *,
        fixed_positions: bool,
        drop_rates: Sequence[float] | None = None,
        mean: tuple[float, ...] | None = None,
        std: tuple[float, ...] | None = None,
        kernels: str = "auto",
        residual_dtype: torch.dtype | None = None,
        attention: str = "auto",
        mlp: str = "auto",
        activation_checkpointing: bool = False,
    ):
        super().__init__(
            img_size,
            patch_size,
            in_chans,
            drop_rates=drop_rates,
            mean=mean,
            std=std,
            kernels=kernels,
            residual_dtype=residual_dtype,
            activation_checkpointing=activation_checkpointing,
        )
        check_counts(depth=depth)
        # The order of the state dict is part of the checkpoint format: parameters in this order, then modules in theirs.
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        if fixed_positions:
            self.pos_embed = nn.Parameter(sincos_table(embed_dim, self.grid)[None], requires_grad=False)
        else:
            self.pos_embed = nn.Parameter(torch.zeros(1, 1 + self.num_patches, embed_dim))
        self.patch_embed = PatchEmbed(patch_size, in_chans, embed_dim)
        self.blocks = nn.ModuleList(
            [Block(embed_dim, num_heads, mlp_ratio, attention, kernels, mlp) for _ in range(depth)]
        )

    def embed(self, patches: Tensor, ids_keep: Tensor | None = None) -> Tensor:
        """Patches [B,K,P] and where they were [B,K] (None: all, in raster order) -> tokens [B,1+K,D], class token first."""
        tokens = self.patch_embed(patches)
        tokens = tokens + (self.pos_embed[:, 1:] if ids_keep is None else self.pos_embed[0, 1:][ids_keep])
        # Row 0 of the table is zero in pre-training; a classifier trains it like all others.
        cls_token = (self.cls_token + self.pos_embed[:, :1]).expand(len(tokens), -1, -1)
        return self.residual(torch.cat([cls_token, tokens], dim=1))
