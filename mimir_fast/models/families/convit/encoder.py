"""ConViT's encoder: blocks that know where patches are, a class token that joins after them, then ordinary blocks.

Shapes: B batch, L patches, K kept patches, P = C*p*p numbers per patch, D width.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from mimir_fast.config.choices import ORIGINAL
from mimir_fast.models.compat import checked
from mimir_fast.models.encoder import Encoder, Stream, added
from mimir_fast.models.families.convit.attention import GatedAttention, offsets, raster
from mimir_fast.models.layers import Attention, Block, PatchEmbed, check_heads


class ConViTEncoder(Encoder):
    """Patches through `local_up_to_layer` blocks of gated positional attention, then with a class token through the others.

    embed_dim           numbers per head: the width is embed_dim * num_heads
    local_up_to_layer   the first ordinary block
    qkv_bias            whether queries, keys and values have a bias
    compat              "original": the local blocks take the kept patches, in whatever order they come, for a compact grid of
                        their own, so that their number must be a square; None: they take them where they are in the image
    computing           further arguments of Encoder
    The weights are as torch's modules draw them; the subclass initialises them once all its modules are there.
    Raises ValueError where sizes do not fit together.
    Source: d'Ascoli et al., ConViT: Improving Vision Transformers with Soft Convolutional Inductive Biases, 2021.
    """

    positions: Tensor

    def __init__(
        self,
        img_size: int,
        patch_size: int,
        in_chans: int,
        embed_dim: int,
        depth: int,
        num_heads: int,
        mlp_ratio: float,
        qkv_bias: bool,
        local_up_to_layer: int,
        *,
        compat: str | None = None,
        attention: str = "auto",
        mlp: str = "auto",
        **computing: Any,
    ):
        super().__init__(img_size, patch_size, in_chans, **computing)
        if not 1 <= local_up_to_layer < depth:
            raise ValueError(f"local_up_to_layer: got {local_up_to_layer}, expected 1 to {depth - 1}, below the depth")
        self.compat, self.local_up_to_layer, self.width = checked(compat), local_up_to_layer, embed_dim * num_heads
        self._block = (mlp_ratio, attention, self.kernels, mlp)
        # The order of the state dict is part of the checkpoint format: parameters in this order, then modules in theirs.
        self.cls_token = nn.Parameter(torch.zeros(1, 1, self.width))
        self.pos_embed = nn.Parameter(torch.zeros(1, self.num_patches, self.width))
        self.patch_embed = PatchEmbed(patch_size, in_chans, self.width)
        self.blocks = self.make_blocks(depth, self.width, num_heads, qkv_bias)
        # Not persistent: it follows from the grid, and the original's files have no such entry.
        self.register_buffer("positions", raster(self.grid), persistent=False)

    def make_blocks(self, depth: int, width: int, num_heads: int, bias: bool = True) -> nn.ModuleList:
        """Blocks, local up to `local_up_to_layer`."""
        check_heads(width, num_heads)
        backend = self._block[1]
        attentions = (
            GatedAttention(width, num_heads, bias, backend, self.kernels)
            if i < self.local_up_to_layer
            else Attention(width, num_heads, backend, bias)
            for i in range(depth)
        )
        return nn.ModuleList([Block(width, num_heads, *self._block, attn=attn) for attn in attentions])

    def start_as_convolution(self, strength: float, draw: Callable[[Tensor], Tensor]) -> None:
        """See `GatedAttention.look_around`, for every local block."""
        for module in self.modules():
            if isinstance(module, GatedAttention):
                module.look_around(strength, draw)

    def run(self, patches: Tensor, ids_keep: Tensor | None = None, factors: Tensor | None = None) -> Stream:
        """Patches [B,K,P] and where they were [B,K] (None: all, in raster order) through all blocks: tokens [B,1+K,D], class
        token first, with the last addition left to do.  factors: see `drop_factors`."""
        tokens = self.patch_embed(patches)
        tokens = tokens + (self.pos_embed if ids_keep is None else self.pos_embed[0][ids_keep])
        local, given = self.local_up_to_layer, (offsets(self._places(ids_keep)),)
        stream = self.run_blocks(self.residual(tokens), factors, 0, local, given)
        # What is pending has no row for the class token that joins here.
        tokens = added(stream, None if factors is None else factors[2 * local])
        # Without a position of its own, as in the original.
        cls_token = self.cls_token.expand(len(tokens), -1, -1)
        return self.run_blocks(self.residual(torch.cat([cls_token, tokens], dim=1)), factors, local)

    def _places(self, ids_keep: Tensor | None) -> Tensor:
        """Columns and rows of the kept patches: [2,K] of all images, or [2,B,K]."""
        if ids_keep is None:
            return self.positions
        if self.compat == ORIGINAL:
            # Kept patches in the order of the noise side by side: the original's defect (docs/fidelity.md, D1).
            return raster(math.isqrt(ids_keep.shape[1]), ids_keep.device)
        return self.positions[:, ids_keep]
