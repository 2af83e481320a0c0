"""Swin's masked autoencoder.

Shapes: B batch, C channels, H W sides, L units, K kept units, P = C*unit*unit numbers per unit, D the encoder's last width,
E decoder width.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mimir_fast.config.choices import ORIGINAL
from mimir_fast.kernels import patch_gather
from mimir_fast.models.autoencoder import MaskedAutoencoder
from mimir_fast.models.compat import checked
from mimir_fast.models.encoder import Stream
from mimir_fast.models.families.swin.encoder import SwinEncoder
from mimir_fast.models.families.swin.layers import WindowAttention
from mimir_fast.models.layers import Block, add_and_norm, check_counts, init_xavier, sincos_table


class MaskedAutoencoderSwin(MaskedAutoencoder):
    """A Swin encoder over the visible units and a light decoder that predicts the removed ones: images [B,C,H,W] -> loss,
    predictions [B,L,P], mask [B,L], latent [B,K,D] in raster order (see `forward`).

    The mask is the whole batch's, a single row of noise [1,L]: windows of what is visible are then alike in all images, and
    packed once, on the host.
    The state dict has the original MIMIR's keys, shapes and order.  The decoder's positional table is fixed.
    compat: "original": the decoder takes latent tokens, which stand in raster order, for tokens in the order of the mask's
    noise; None: each goes to its own unit.
    drop_path_rate: must be 0, as in the original.  Sizes: as in SwinEncoder; patch_size is a token's, `patch_size` of the model
    the unit's.  computing: kernels, attention, mlp, residual_dtype, activation_checkpointing, as in MaskedAutoencoderViT.
    Raises ValueError where sizes do not fit together.
    Source: He et al., Masked Autoencoders Are Scalable Vision Learners, 2022; Huang et al., Green Hierarchical Vision
    Transformer for Masked Image Modeling, 2022; MIMIR, arXiv 2312.04960.
    """

    prefix_tokens = 0
    masks_on_host = True

    def __init__(
        self,
        img_size: int = 224,
        patch_size: int = 4,
        in_chans: int = 3,
        embed_dim: int = 96,
        depths: Sequence[int] = (2, 2, 6, 2),
        num_heads: Sequence[int] = (3, 6, 12, 24),
        window_size: int = 7,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        unit: int | None = None,
        drop_path_rate: float = 0.0,
        decoder_embed_dim: int = 128,
        decoder_depth: int = 2,
        decoder_num_heads: int = 16,
        norm_pix_loss: bool = False,
        compat: str | None = None,
        attention: str = "auto",
        mlp: str = "auto",
        **computing: Any,
    ):
        super().__init__()
        if drop_path_rate:
            raise ValueError(f"drop_path_rate: pre-training leaves out no blocks; got {drop_path_rate}, expected 0")
        check_counts(decoder_depth=decoder_depth)
        sizes = (embed_dim, depths, num_heads, window_size, mlp_ratio, qkv_bias)
        # A module inside, and no base class as in other families: the original's files call all of it encoder.*.
        encoder = SwinEncoder(
            img_size, patch_size, in_chans, *sizes, unit=unit, attention=attention, mlp=mlp, **computing
        )
        self.img_size, self.in_chans, self.kernels = img_size, in_chans, encoder.kernels
        self.patch_size, self.num_patches = encoder.patch_size, encoder.num_patches
        self.norm_pix_loss, self.compat = norm_pix_loss, checked(compat)
        # The order of the state dict is part of the checkpoint format.
        self.mask_token = nn.Parameter(torch.zeros(1, 1, decoder_embed_dim))
        # The table's first row is for a class token, which a Swin lacks.
        table = sincos_table(decoder_embed_dim, encoder.grid)[None, 1:]
        self.decoder_pos_embed = nn.Parameter(table, requires_grad=False)
        self.encoder = encoder
        self.decoder_embed = nn.Linear(encoder.width, decoder_embed_dim)
        self.decoder_blocks = nn.ModuleList(
            Block(decoder_embed_dim, decoder_num_heads, mlp_ratio, attention, self.kernels, mlp)
            for _ in range(decoder_depth)
        )
        self.decoder_norm = nn.LayerNorm(decoder_embed_dim, eps=1e-6)
        self.decoder_pred = nn.Linear(decoder_embed_dim, self.patch_size**2 * in_chans)
        self._initialise()

    @torch.no_grad()
    def _initialise(self) -> None:
        self.apply(init_xavier)
        # As the linear layer that it is: of a convolution's weight Xavier would take fan_out to be D*p*p.
        nn.init.xavier_uniform_(self.encoder.patch_embed.proj.weight.flatten(1))
        for module in self.modules():
            if isinstance(module, WindowAttention):
                nn.init.trunc_normal_(module.relative_position_bias_table, std=0.02)
        nn.init.normal_(self.mask_token, std=0.02)

    # ---- the mask: one row for the whole batch

    def noise_shape(self, batch: int) -> tuple[int, int]:
        """[1,L], for any batch."""
        return 1, self.num_patches

    def random_masking(self, noise_BL: Tensor, mask_ratio: float) -> tuple[Tensor, Tensor, int]:
        """As MaskedAutoencoder says, with a single row; raises ValueError for more."""
        if noise_BL.shape[0] != 1:
            raise ValueError(
                f"noise: expected [1,{self.num_patches}], a row for all images, got {tuple(noise_BL.shape)}"
            )
        return super().random_masking(noise_BL, mask_ratio)

    def host_plan(self, noise_BL: np.ndarray, mask_ratio: float) -> np.ndarray | None:
        """Windows of the units that this noise [1,L] keeps, int32 [n]; None where they need more groups than nearly all do."""
        # The order of mask_indices, NaN last and ties by index: the device keeps the same units that are packed here.
        order = np.argsort(np.where(np.isnan(noise_BL[0]), np.inf, noise_BL[0]), kind="stable")
        keep = self.kept(mask_ratio)
        return self.encoder.plan(keep).row(order[:keep])

    # ---- encode, decode

    def visible(self, images: Tensor, ids_keep: Tensor) -> Tensor:
        """The kept units [B,K,P]."""
        return patch_gather(images, ids_keep.expand(len(images), -1), self.patch_size, impl=self.kernels)

    def encode(self, visible: Tensor, ids_keep: Tensor, plan: Tensor | None = None) -> Tensor:
        """Kept units [B,K,P], which they are [1,K] and their windows (`host_plan`; None: packed now, which waits for the
        device) -> latent [B,K,D] in raster order."""
        ids = ids_keep[0]
        if plan is None:
            kept = ids.cpu().numpy()
            # Wide: this mask was given and must be laid out; a training may draw another in its place.
            row = self.encoder.plan(len(kept)).row(kept, wide=True)
            plan = torch.from_numpy(row).to(visible.device)
        # The encoder keeps the units' order, whatever it is; the original's latent is in raster order.
        latent = self.encoder.run(visible, self.encoder.plan(len(ids)).windows(plan))
        return latent.index_select(1, ids.argsort())

    def decode(self, latent: Tensor, ids_shuffle: Tensor, query_start: int) -> Tensor:
        """As MaskedAutoencoder says, ids_shuffle [1,L]; the last block leaves out the units before `query_start`, which are
        needed as keys and values only."""
        tokens, ids, keep = self.decoder_embed(latent), ids_shuffle[0], latent.shape[1]
        if self.compat != ORIGINAL:
            # From raster order back to that of ids_shuffle.
            # Sorted twice, numbers become their ranks: a unit's rank in raster order is its row in the latent.
            tokens = tokens.index_select(1, ids[:keep].argsort().argsort())
        removed = self.mask_token.to(tokens.dtype).expand(len(tokens), len(ids) - keep, -1)
        # Attention does not ask for the order of tokens: they stay shuffled, so that removed units are the last ones.
        tokens = torch.cat([tokens, removed], dim=1) + self.decoder_pos_embed[:, ids]
        stream: Stream = (self.encoder.residual(tokens), None, None)
        # Never recomputed, whatever activation_checkpointing says: these blocks are few and narrow.
        for block in self.decoder_blocks[:-1]:
            stream = block(*stream)
        stream = self.decoder_blocks[-1](*stream, query_start)
        return self.decoder_pred(add_and_norm(*stream, self.decoder_norm, self.kernels)[1])

    def loss(self, pred: Tensor, ids: Tensor, images: Tensor) -> Tensor:
        """As MaskedAutoencoder says; ids [1,M] of all images."""
        return super().loss(pred, ids.expand(len(images), -1), images)
