"""The Vision Transformer's masked autoencoder.

Shapes: B batch, C channels, H W sides, L patches, K kept patches, P = p*p*C numbers per patch,
D encoder width, E decoder width.
"""

import torch
from torch import Tensor, nn

from mimir_fast.kernels import token_restore
from mimir_fast.models.autoencoder import MaskedAutoencoder
from mimir_fast.models.encoder import Stream
from mimir_fast.models.families.vit.encoder import ViTEncoder
from mimir_fast.models.layers import Block, add_and_norm, check_counts, init_xavier, sincos_table


class MaskedAutoencoderViT(ViTEncoder, MaskedAutoencoder):
    """A ViT encoder over the visible patches and a light decoder that predicts the removed ones: images [B,C,H,W] -> loss,
    predictions [B,L,P], mask [B,L], latent [B,1+K,D] (see `forward`).

    The state dict has the original MIMIR's keys, shapes and order.  Positional tables are fixed (requires_grad False).
    kernels: implementation of the operations in mimir_fast.kernels, "auto" (Triton on CUDA), "triton" or "reference".
    activation_checkpointing: keep each encoder block's inputs only and compute the block again in the backward pass.
    attention: backend by name, see mimir_fast/models/attention.py; mlp: implementation of the operation mlp, as for kernels.
    residual_dtype: storage of the tokens between blocks; default: whatever comes out of adding to fp32 tokens, fp32.
    Raises ValueError where sizes do not fit together.
    Source: He et al., Masked Autoencoders Are Scalable Vision Learners, 2022; MIMIR, arXiv 2312.04960.
    """

    def __init__(
        self,
        img_size: int = 224,
        patch_size: int = 16,
        in_chans: int = 3,
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        decoder_embed_dim: int = 128,
        decoder_depth: int = 2,
        decoder_num_heads: int = 16,
        mlp_ratio: float = 4.0,
        norm_pix_loss: bool = False,
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
            embed_dim,
            depth,
            num_heads,
            mlp_ratio,
            fixed_positions=True,
            kernels=kernels,
            residual_dtype=residual_dtype,
            attention=attention,
            mlp=mlp,
            activation_checkpointing=activation_checkpointing,
        )
        check_counts(decoder_depth=decoder_depth)
        self.norm_pix_loss = norm_pix_loss
        # In this order, as in ViTEncoder: the state dict has the parameters of both first, then all modules.
        self.mask_token = nn.Parameter(torch.zeros(1, 1, decoder_embed_dim))
        self.decoder_pos_embed = nn.Parameter(sincos_table(decoder_embed_dim, self.grid)[None], requires_grad=False)
        self.norm = nn.LayerNorm(embed_dim, eps=1e-6)
        self.decoder_embed = nn.Linear(embed_dim, decoder_embed_dim)
        self.decoder_blocks = nn.ModuleList(
            [
                Block(decoder_embed_dim, decoder_num_heads, mlp_ratio, attention, kernels, mlp)
                for _ in range(decoder_depth)
            ]
        )
        self.decoder_norm = nn.LayerNorm(decoder_embed_dim, eps=1e-6)
        self.decoder_pred = nn.Linear(decoder_embed_dim, patch_size**2 * in_chans)
        self.apply(init_xavier)
        # As the linear layer that it is: of a convolution's weight Xavier would take fan_out to be D*p*p.
        nn.init.xavier_uniform_(self.patch_embed.proj.weight.data.flatten(1))
        nn.init.normal_(self.cls_token, std=0.02)
        nn.init.normal_(self.mask_token, std=0.02)

    def visible(self, images: Tensor, ids_keep: Tensor) -> Tensor:
        """The kept patches [B,K,P]."""
        return self.patchify(images, ids_keep)

    def encode(self, visible: Tensor, ids_keep: Tensor, plan: Tensor | None = None) -> Tensor:
        """Kept patches [B,K,P] and where they were [B,K] -> latent [B,1+K,D]."""
        stream = self.run_blocks(self.embed(visible, ids_keep))
        # In the parameters' type, fp32, whatever the blocks compute in: the penalty takes distances of these numbers.
        return add_and_norm(*stream, self.norm, self.kernels, self.norm.weight.dtype)[1]

    def decode(self, latent: Tensor, ids_shuffle: Tensor, query_start: int) -> Tensor:
        """As MaskedAutoencoder says; the last block leaves out the tokens before `query_start`, which are needed as keys and
        values only."""
        tokens = self.decoder_embed(latent)
        pos_embed = self.decoder_pos_embed[0]
        tokens = token_restore(tokens, self.mask_token[0, 0], pos_embed, ids_shuffle, impl=self.kernels)
        # Attention does not ask for the order of tokens: they stay shuffled, so that removed patches are the last ones.
        stream: Stream = (self.residual(tokens), None, None)
        # Never recomputed, whatever activation_checkpointing says: these blocks are few and narrow.
        for block in self.decoder_blocks[:-1]:
            stream = block(*stream)
        stream = self.decoder_blocks[-1](*stream, query_start)
        return self.decoder_pred(add_and_norm(*stream, self.decoder_norm, self.kernels)[1])
