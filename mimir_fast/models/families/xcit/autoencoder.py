"""XCiT's masked autoencoder.

Shapes: B batch, C channels, H W sides, L patches, K kept patches, P = p*p*C numbers per patch, D encoder width, E decoder
width.
"""

from typing import Any

import torch
from torch import Tensor, nn

from mimir_fast.config.choices import ORIGINAL
from mimir_fast.models.autoencoder import MaskedAutoencoder
from mimir_fast.models.families.xcit.attention import EPS, Grid
from mimir_fast.models.families.xcit.encoder import XCiTEncoder, through
from mimir_fast.models.families.xcit.layers import FourierPositions
from mimir_fast.models.layers import check_counts, init_trunc_normal


class MaskedAutoencoderXCiT(XCiTEncoder, MaskedAutoencoder):
    """An XCiT encoder over the visible patches and a light decoder of the same blocks that predicts the removed ones: images
    [B,C,H,W] -> loss, predictions [B,L,P], mask [B,L], latent [B,1+K,D] (see `forward`).

    The state dict has the original MIMIR's keys, shapes and order.  Predictions do not depend on the class token, neither in
    the encoder nor in the decoder: without a penalty of the latent its parameters have gradients of zero.
    Sizes and compat: as in XCiTEncoder; the decoder has as many layers of the class token.  computing: kernels, attention, mlp,
    residual_dtype, activation_checkpointing, as in MaskedAutoencoderViT; attention changes nothing.
    Raises ValueError where sizes do not fit together.
    Source: He et al., Masked Autoencoders Are Scalable Vision Learners, 2022; MIMIR, arXiv 2312.04960.
    """

    def __init__(
        self,
        img_size: int = 224,
        patch_size: int = 16,
        in_chans: int = 3,
        embed_dim: int = 384,
        depth: int = 12,
        num_heads: int = 8,
        mlp_ratio: float = 4.0,
        eta: float = 1.0,
        tokens_norm: bool = True,
        cls_attn_layers: int = 2,
        decoder_embed_dim: int = 128,
        decoder_depth: int = 2,
        decoder_num_heads: int = 16,
        norm_pix_loss: bool = False,
        compat: str | None = None,
        **computing: Any,
    ):
        sizes = (embed_dim, depth, num_heads, mlp_ratio, eta, tokens_norm, cls_attn_layers)
        super().__init__(img_size, patch_size, in_chans, *sizes, compat=compat, **computing)
        check_counts(decoder_depth=decoder_depth)
        self.norm_pix_loss = norm_pix_loss
        # In this order, as in XCiTEncoder: the state dict has the parameters of both first, then all modules.
        self.mask_token = nn.Parameter(torch.zeros(1, 1, decoder_embed_dim))
        self.decoder_embed = nn.Linear(embed_dim, decoder_embed_dim)
        self.decoder_pos_embed = FourierPositions(decoder_embed_dim, self.grid)
        self.decoder_blocks = self.make_blocks(decoder_depth, decoder_embed_dim, decoder_num_heads)
        self.decoder_cls_attn_blocks = self.make_class_blocks(decoder_embed_dim, decoder_num_heads)
        self.decoder_norm = nn.LayerNorm(decoder_embed_dim, eps=EPS)
        self.decoder_pred = nn.Linear(decoder_embed_dim, patch_size**2 * in_chans)
        # The last entry of the state dict, as in the original's files.
        self.add_norm(embed_dim)
        # Linear layers alone: the original leaves convolutions, those of positions too, as torch draws them.
        self.apply(init_trunc_normal)
        nn.init.normal_(self.cls_token, std=0.02)
        nn.init.normal_(self.mask_token, std=0.02)

    def random_masking(self, noise_BL: Tensor, mask_ratio: float) -> tuple[Tensor, Tensor, int]:
        """As MaskedAutoencoder says; raises ValueError under compat="original" for another share than a quarter of an even
        grid."""
        ids_shuffle, ids_restore, keep = super().random_masking(noise_BL, mask_ratio)
        if self.compat == ORIGINAL and keep != (self.grid // 2) ** 2:
            raise ValueError(
                f"mask_ratio: {mask_ratio} keeps {keep} of {self.num_patches} patches, which compat {ORIGINAL} takes for a "
                f"grid of half the side, {(self.grid // 2) ** 2} patches; choose 0.75 on an even grid, or leave out compat"
            )
        return ids_shuffle, ids_restore, keep

    def visible(self, images: Tensor, ids_keep: Tensor) -> Tensor:
        """The images [B,C,H,W], zero in removed patches; under compat="original" as they are."""
        if self.compat == ORIGINAL:
            return images
        # Before the stem: a token of 16 pixels also sees 15 pixels above its patch and 15 to the left of it.
        grid, p = self.grid, self.patch_size
        seen = self.seen(ids_keep).view(-1, 1, grid, 1, grid, 1).expand(-1, -1, -1, p, -1, p)
        return images * seen.reshape(-1, 1, *images.shape[2:])

    def encode(self, visible: Tensor, ids_keep: Tensor, plan: Tensor | None = None) -> Tensor:
        """What `visible` returns, and which patches are kept [B,K] -> latent [B,1+K,D]."""
        return self.run(visible, ids_keep)

    def decode(self, latent: Tensor, ids_shuffle: Tensor, query_start: int) -> Tensor:
        """As MaskedAutoencoder says."""
        tokens = self.decoder_embed(latent)
        # Put aside: convolutions over the grid have no place for it.
        cls_token, tokens = tokens[:, :1], tokens[:, 1:]
        ids = ids_shuffle[:, :, None].expand(-1, -1, tokens.shape[2])
        # In raster order, which the convolutions need.
        grid = self.mask_token.to(tokens.dtype).expand_as(ids).scatter(1, ids[:, : tokens.shape[1]], tokens)
        # Never recomputed, whatever activation_checkpointing says: these blocks are few and narrow.
        grid = through(self.decoder_blocks, self.residual(grid + self.decoder_pos_embed()), Grid(self.grid))
        tokens = torch.cat([cls_token.to(grid.dtype), grid], dim=1)
        # Needed for the patches, which they normalise and scale, although nobody asks what becomes of the class token.
        for block in self.decoder_cls_attn_blocks:
            tokens = block(tokens)
        # query_start counts the class token, ids_shuffle does not.
        wanted = self.decoder_norm(tokens[:, 1:].gather(1, ids[:, query_start - 1 :]))
        return self.decoder_pred(wanted.to(self.decoder_pred.weight.dtype))
