"""Masked autoencoders: what those of all families share, and the Vision Transformer's.

Shapes: B batch, C channels, L patches, K kept patches, P = p*p*C numbers per patch, D encoder width, E decoder width.
"""

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from mimir_fast.kernels import mask_indices, masked_patch_loss, token_restore
from mimir_fast.models.encoder import Encoder, Stream
from mimir_fast.models.layers import Block, add_and_norm, check_images, sincos_table
from mimir_fast.training.stages import stage


class MaskedAutoencoder(nn.Module, ABC):
    """Encode the patches that a random mask leaves, predict the others: what the families' autoencoders share.

    img_size, in_chans   the images are [B,in_chans,img_size,img_size]
    patch_size           side of a patch, the unit of the mask; num_patches: L of an image
    norm_pix_loss        the loss takes every target patch normalised by its own mean and deviation
    kernels              implementation of the operations in mimir_fast.kernels
    """

    img_size: int
    in_chans: int
    patch_size: int
    num_patches: int
    norm_pix_loss: bool
    kernels: str

    @abstractmethod
    def visible(self, images: Tensor, ids_keep: Tensor) -> Tensor:
        """What `encode` takes of images [B,C,H,W] whose patches ids_keep [B,K] are kept: these patches, [B,K,P], or the images
        themselves where the family's record says that masking is of "images"."""

    @abstractmethod
    def encode(self, visible: Tensor, ids_keep: Tensor) -> Tensor:
        """What `visible` returns, and which patches are kept [B,K] -> latent [B,1+K,D], class token first."""

    @abstractmethod
    def decode(self, latent: Tensor, ids_shuffle: Tensor, query_start: int) -> Tensor:
        """latent [B,1+K,D], ids_shuffle [B,L] -> predictions [B,1+L-query_start,P] for tokens[query_start:] in shuffled order.

        1 is the first patch, 1+K the first removed one.
        """

    def forward(
        self,
        imgs: Tensor,
        mask_ratio: float = 0.75,
        adv_images: Tensor | None = None,
        noise: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Encode the visible patches of `adv_images` (default: of `imgs`) and reconstruct the patches of `imgs`.

        imgs, adv_images [B,C,H,W]; mask_ratio the removed share of patches, K = int(L * (1 - mask_ratio));
        noise [B,L] decides the mask (its K smallest entries stay) and is drawn uniformly when absent.
        Returns loss (scalar), pred [B,L,P], mask [B,L] (1 = removed), latent [B,1+K,D] (class token first, then kept
        patches in the order of the noise).  Raises ValueError naming the argument that does not fit.
        """
        check_images("imgs", imgs, self.in_chans, self.img_size)
        seen = imgs if adv_images is None else adv_images
        if seen.shape != imgs.shape:
            raise ValueError(f"adv_images: expected {tuple(imgs.shape)} like imgs, got {tuple(seen.shape)}")
        if noise is None:
            noise = torch.rand(self.noise_shape(len(imgs)), device=imgs.device)
        ids_shuffle, ids_restore, keep = self.random_masking(noise, mask_ratio)
        ids_keep = ids_shuffle[:, :keep]
        latent = self.encode(self.visible(seen, ids_keep), ids_keep)
        pred = self.decode(latent, ids_shuffle, query_start=1)
        loss = self.loss(pred[:, keep:], ids_shuffle[:, keep:], imgs)
        pred = pred.gather(1, ids_restore[:, :, None].expand_as(pred))
        return loss, pred, (ids_restore >= keep).to(noise.dtype), latent

    def noise_shape(self, batch: int) -> tuple[int, int]:
        """[rows, L] of the noise that decides the mask: a row for each image, or a single one where the family masks the whole
        batch alike."""
        return batch, self.num_patches

    def random_masking(self, noise_BL: Tensor, mask_ratio: float) -> tuple[Tensor, Tensor, int]:
        """noise [B,L], removed share -> ids_shuffle [B,L], kept patches first; ids_restore [B,L], its inverse; K, how many."""
        if not 0 <= mask_ratio < 1:
            raise ValueError(f"mask_ratio: expected 0 <= ratio < 1, got {mask_ratio}")
        if noise_BL.ndim != 2 or noise_BL.shape[1] != self.num_patches:
            raise ValueError(f"noise: expected [B,{self.num_patches}], got {tuple(noise_BL.shape)}")
        keep = int(self.num_patches * (1 - mask_ratio))
        if keep < 1:
            raise ValueError(f"mask_ratio: {mask_ratio} keeps none of {self.num_patches} patches; lower it")
        return *mask_indices(noise_BL, impl=self.kernels), keep

    def reconstruct(self, latent: Tensor, ids_shuffle: Tensor, images: Tensor) -> tuple[Tensor, Tensor]:
        """latent [B,1+K,D], ids_shuffle [B,L], images [B,C,H,W] -> loss, predictions of the removed patches [B,L-K,P]."""
        pred = self.decode(latent, ids_shuffle, query_start=latent.shape[1])
        with stage("loss"):
            return self.loss(pred, ids_shuffle[:, latent.shape[1] - 1 :], images), pred

    def loss(self, pred: Tensor, ids: Tensor, images: Tensor) -> Tensor:
        """Mean squared error of predictions [B,M,P] for patches ids [B,M] of images [B,C,H,W]."""
        return masked_patch_loss(pred, images, ids, self.patch_size, self.norm_pix_loss, impl=self.kernels)


class MaskedAutoencoderViT(Encoder, MaskedAutoencoder):
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
        if decoder_depth < 1:
            raise ValueError(f"decoder_depth: expected 1 or more, got {decoder_depth}")
        self.norm_pix_loss = norm_pix_loss
        # parameters stand before modules in the state dict, whenever they are declared
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
        self.apply(_init_linear)
        nn.init.xavier_uniform_(self.patch_embed.proj.weight.data.flatten(1))
        nn.init.normal_(self.cls_token, std=0.02)
        nn.init.normal_(self.mask_token, std=0.02)

    def visible(self, images: Tensor, ids_keep: Tensor) -> Tensor:
        """The kept patches [B,K,P]."""
        return self.patchify(images, ids_keep)

    def encode(self, visible: Tensor, ids_keep: Tensor) -> Tensor:
        """Kept patches [B,K,P] and where they were [B,K] -> latent [B,1+K,D]."""
        stream = self.run_blocks(self.embed(visible, ids_keep))
        return add_and_norm(*stream, self.norm, self.kernels, self.norm.weight.dtype)[1]

    def decode(self, latent: Tensor, ids_shuffle: Tensor, query_start: int) -> Tensor:
        """As MaskedAutoencoder says; the last block leaves out the tokens before `query_start`, which are needed as keys and
        values only."""
        tokens = self.decoder_embed(latent)
        pos_embed = self.decoder_pos_embed[0]
        tokens = token_restore(tokens, self.mask_token[0, 0], pos_embed, ids_shuffle, impl=self.kernels)
        stream: Stream = (self.residual(tokens), None, None)
        for block in self.decoder_blocks[:-1]:
            stream = block(*stream)
        stream = self.decoder_blocks[-1](*stream, query_start)
        return self.decoder_pred(add_and_norm(*stream, self.decoder_norm, self.kernels)[1])


def _init_linear(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        nn.init.zeros_(module.bias)
