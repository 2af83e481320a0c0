"""CaiT's masked autoencoder.

Shapes: B batch, C channels, H W sides, L patches, K kept patches, P = p*p*C numbers per patch, D encoder width, E decoder
width.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mimir_fast.kernels import token_restore
from mimir_fast.models.autoencoder import MaskedAutoencoder
from mimir_fast.models.encoder import Stream
from mimir_fast.models.families.cait.attention import EPS
from mimir_fast.models.families.cait.encoder import CaiTEncoder
from mimir_fast.models.layers import add_and_norm, check_counts, init_xavier, sincos_table


class MaskedAutoencoderCaiT(CaiTEncoder, MaskedAutoencoder):
    """A CaiT encoder over the visible patches and a light decoder of talking heads that predicts the removed ones: images
    [B,C,H,W] -> loss, predictions [B,L,P], mask [B,L], latent [B,1+K,D] (see `forward`).

    The state dict has the original MIMIR's keys, shapes and order.  The encoder's positional table starts as the sine-cosine
    one and is trained; the decoder's is fixed (requires_grad False).
    Sizes and compat: as in CaiTEncoder.  computing: kernels, attention, mlp, residual_dtype, activation_checkpointing, as in
    MaskedAutoencoderViT; attention changes nothing, talking heads have no backends.
    Raises ValueError where sizes do not fit together.
    Source: He et al., Masked Autoencoders Are Scalable Vision Learners, 2022; MIMIR, arXiv 2312.04960.
    """

    def __init__(
        self,
        img_size: int = 224,
        patch_size: int = 16,
        in_chans: int = 3,
        embed_dim: int = 192,
        depth: int = 24,
        num_heads: int = 4,
        mlp_ratio: float = 4.0,
        init_values: float = 1e-5,
        depth_token_only: int = 2,
        mlp_ratio_token_only: float = 4.0,
        decoder_embed_dim: int = 128,
        decoder_depth: int = 2,
        decoder_num_heads: int = 16,
        norm_pix_loss: bool = False,
        compat: str | None = None,
        **computing: Any,
    ):
        sizes = (embed_dim, depth, num_heads, mlp_ratio, init_values, depth_token_only, mlp_ratio_token_only)
        super().__init__(img_size, patch_size, in_chans, *sizes, compat=compat, **computing)
        check_counts(decoder_depth=decoder_depth)
        self.norm_pix_loss = norm_pix_loss
        # In this order, as in CaiTEncoder: the state dict has the parameters of both first, then all modules.
        self.mask_token = nn.Parameter(torch.zeros(1, 1, decoder_embed_dim))
        # Without the class token's row of zeros: the original stores [1,L,E].
        table = sincos_table(decoder_embed_dim, self.grid)[None, 1:]
        self.decoder_pos_embed = nn.Parameter(table, requires_grad=False)
        self.decoder_embed = nn.Linear(embed_dim, decoder_embed_dim)
        self.decoder_blocks = self.make_blocks(decoder_depth, decoder_embed_dim, decoder_num_heads)
        self.decoder_norm = nn.LayerNorm(decoder_embed_dim, eps=EPS)
        self.decoder_pred = nn.Linear(decoder_embed_dim, patch_size**2 * in_chans)
        self._initialise(embed_dim)

    @torch.no_grad()
    def _initialise(self, width: int) -> None:
        self.apply(init_xavier)
        # As the linear layer that it is: of a convolution's weight Xavier would take fan_out to be D*p*p.
        nn.init.xavier_uniform_(self.patch_embed.proj.weight.flatten(1))
        nn.init.normal_(self.cls_token, std=0.02)
        nn.init.normal_(self.mask_token, std=0.02)
        # Where training begins: the original trains this table, with weight decay, and a ViT's not.
        self.pos_embed.copy_(sincos_table(width, self.grid)[1:])

    def visible(self, images: Tensor, ids_keep: Tensor) -> Tensor:
        """The kept patches [B,K,P]."""
        return self.patchify(images, ids_keep)

    def encode(self, visible: Tensor, ids_keep: Tensor, plan: Tensor | None = None) -> Tensor:
        """Kept patches [B,K,P] and where they were [B,K] -> latent [B,1+K,D]."""
        return self.run(visible, ids_keep)

    def decode(self, latent: Tensor, ids_shuffle: Tensor, query_start: int) -> Tensor:
        """As MaskedAutoencoder says; the last block leaves out the tokens before `query_start`, which are needed as keys and
        values only."""
        tokens = self.decoder_embed(latent)
        # The class token has no position: a row of zeros.
        positions = F.pad(self.decoder_pos_embed[0], (0, 0, 1, 0))
        tokens = token_restore(tokens, self.mask_token[0, 0], positions, ids_shuffle, impl=self.kernels)
        # Attention does not ask for the order of tokens: they stay shuffled, so that removed patches are the last ones.
        stream: Stream = (self.residual(tokens), None, None)
        # Never recomputed, whatever activation_checkpointing says: these blocks are few and narrow.
        for block in self.decoder_blocks[:-1]:
            stream = block(*stream)
        stream = self.decoder_blocks[-1](*stream, query_start)
        return self.decoder_pred(add_and_norm(*stream, self.decoder_norm, self.kernels)[1])
