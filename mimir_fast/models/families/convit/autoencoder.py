"""ConViT's masked autoencoder.

Shapes: B batch, C channels, H W sides, L patches, K kept patches, P = p*p*C numbers per patch, D encoder width, E decoder
width.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn

from mimir_fast.config.choices import ORIGINAL
from mimir_fast.models.autoencoder import MaskedAutoencoder
from mimir_fast.models.families.convit.attention import offsets
from mimir_fast.models.families.convit.encoder import ConViTEncoder
from mimir_fast.models.layers import add_and_norm, init_xavier, sincos_table


class MaskedAutoencoderConViT(ConViTEncoder, MaskedAutoencoder):
    """A ConViT encoder over the visible patches and a light decoder, local too, that predicts the removed ones: images
    [B,C,H,W] -> loss, predictions [B,L,P], mask [B,L], latent [B,1+K,D] (see `forward`).

    The state dict has the original MIMIR's keys, shapes and order.  The encoder's positional table starts as the sine-cosine
    one and is trained; the decoder's is fixed (requires_grad False).
    locality_strength: how sharply local heads look at their places when training begins.
    Sizes and compat: as in ConViTEncoder.  computing: kernels, attention, mlp, residual_dtype, activation_checkpointing, as in
    MaskedAutoencoderViT.
    Raises ValueError where sizes do not fit together.
    Source: He et al., Masked Autoencoders Are Scalable Vision Learners, 2022; MIMIR, arXiv 2312.04960.
    """

    def __init__(
        self,
        img_size: int = 224,
        patch_size: int = 16,
        in_chans: int = 3,
        embed_dim: int = 48,
        depth: int = 12,
        num_heads: int = 16,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        local_up_to_layer: int = 10,
        locality_strength: float = 1.0,
        decoder_embed_dim: int = 128,
        decoder_depth: int = 2,
        decoder_num_heads: int = 16,
        norm_pix_loss: bool = False,
        compat: str | None = None,
        **computing: Any,
    ):
        sizes = (embed_dim, depth, num_heads, mlp_ratio, qkv_bias, local_up_to_layer)
        super().__init__(img_size, patch_size, in_chans, *sizes, compat=compat, **computing)
        # Deeper blocks would be ordinary ones, which the original cannot run in its decoder: their shapes do not fit.
        if not 1 <= decoder_depth <= local_up_to_layer:
            allowed = f"1 to {local_up_to_layer}, the encoder's local_up_to_layer"
            raise ValueError(f"decoder_depth: got {decoder_depth}, expected {allowed}")
        self.norm_pix_loss = norm_pix_loss
        # In this order, as in ConViTEncoder: the state dict has the parameters of both first, then all modules.
        self.mask_token = nn.Parameter(torch.zeros(1, 1, decoder_embed_dim))
        # Without a class token's row: the original stores [1,L,E].
        table = sincos_table(decoder_embed_dim, self.grid)[None, 1:]
        self.decoder_pos_embed = nn.Parameter(table, requires_grad=False)
        self.norm = nn.LayerNorm(self.width, eps=1e-6)
        self.decoder_embed = nn.Linear(self.width, decoder_embed_dim)
        self.decoder_blocks = self.make_blocks(decoder_depth, decoder_embed_dim, decoder_num_heads)
        self.decoder_norm = nn.LayerNorm(decoder_embed_dim, eps=1e-6)
        self.decoder_pred = nn.Linear(decoder_embed_dim, patch_size**2 * in_chans)
        self._initialise(locality_strength)

    @torch.no_grad()
    def _initialise(self, strength: float) -> None:
        self.apply(init_xavier)
        # As the linear layer that it is: of a convolution's weight Xavier would take fan_out to be D*p*p.
        nn.init.xavier_uniform_(self.patch_embed.proj.weight.flatten(1))
        nn.init.normal_(self.cls_token, std=0.02)
        nn.init.normal_(self.mask_token, std=0.02)
        # Where training begins: the original trains this table, with weight decay, and a ViT's not.
        self.pos_embed.copy_(sincos_table(self.width, self.grid)[1:])
        self.start_as_convolution(strength, nn.init.xavier_uniform_)

    def random_masking(self, noise_BL: Tensor, mask_ratio: float) -> tuple[Tensor, Tensor, int]:
        """As MaskedAutoencoder says; raises ValueError under compat="original" where the kept patches are no square number."""
        ids_shuffle, ids_restore, keep = super().random_masking(noise_BL, mask_ratio)
        if self.compat == ORIGINAL and math.isqrt(keep) ** 2 != keep:
            raise ValueError(
                f"mask_ratio: {mask_ratio} keeps {keep} of {self.num_patches} patches, which compat {ORIGINAL} takes for a "
                "square grid; choose a ratio that keeps a square number, or leave out compat"
            )
        return ids_shuffle, ids_restore, keep

    def visible(self, images: Tensor, ids_keep: Tensor) -> Tensor:
        """The kept patches [B,K,P]."""
        return self.patchify(images, ids_keep)

    def encode(self, visible: Tensor, ids_keep: Tensor, plan: Tensor | None = None) -> Tensor:
        """Kept patches [B,K,P] and where they were [B,K] -> latent [B,1+K,D]."""
        stream = self.run(visible, ids_keep)
        # In the parameters' type, fp32, whatever the blocks compute in: the penalty takes distances of these numbers.
        return add_and_norm(*stream, self.norm, self.kernels, self.norm.weight.dtype)[1]

    def decode(self, latent: Tensor, ids_shuffle: Tensor, query_start: int) -> Tensor:
        """As MaskedAutoencoder says."""
        # The class token has no place on the grid: the decoder does without it.
        tokens = self.decoder_embed(latent[:, 1:])
        ids = ids_shuffle[:, :, None].expand(-1, -1, tokens.shape[2])
        # In raster order, so that all images share the positional weights.
        grid = self.mask_token.to(tokens.dtype).expand_as(ids).scatter(1, ids[:, : tokens.shape[1]], tokens)
        stream = (self.residual(grid + self.decoder_pos_embed), None, None)
        given = (offsets(self.positions),)
        # Never recomputed, whatever activation_checkpointing says: these blocks are few and narrow.
        for block in self.decoder_blocks:
            # All tokens are queries, in the last block too: in raster order the removed patches are anywhere.
            stream = block(*stream, 0, None, *given)
        normed = add_and_norm(*stream, self.decoder_norm, self.kernels)[1]
        # query_start counts the class token, which is not here.
        return self.decoder_pred(normed.gather(1, ids[:, query_start - 1 :]))
