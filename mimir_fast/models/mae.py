"""The masked autoencoder.

Shapes: B batch, C channels, L patches, K kept patches, P = p*p*C numbers per patch, D encoder width, E decoder width.
"""

from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mimir_fast.kernels import mask_indices, masked_patch_loss, patch_gather, token_restore
from mimir_fast.models.layers import Block, PatchEmbed, add_and_norm, sincos_table
from mimir_fast.training.stages import stage

# nothing in a block is random: no generator state to keep, which would wait for the device
recomputed = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)


class MaskedAutoencoderViT(nn.Module):
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
        super().__init__()
        if patch_size < 1 or img_size % patch_size:
            raise ValueError(f"patch_size: {patch_size} does not divide the image side {img_size}")
        if decoder_depth < 1:
            raise ValueError(f"decoder_depth: expected 1 or more, got {decoder_depth}")
        self.img_size, self.patch_size, self.norm_pix_loss = img_size, patch_size, norm_pix_loss
        self.kernels, self.residual_dtype = kernels, residual_dtype
        self.activation_checkpointing = activation_checkpointing
        self.num_patches = (img_size // patch_size) ** 2
        # declared first: the order of the state dict is part of the checkpoint format
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.pos_embed = self._positions(embed_dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, decoder_embed_dim))
        self.decoder_pos_embed = self._positions(decoder_embed_dim)
        self.patch_embed = PatchEmbed(patch_size, in_chans, embed_dim)
        self.blocks = nn.ModuleList(
            [Block(embed_dim, num_heads, mlp_ratio, attention, kernels, mlp) for _ in range(depth)]
        )
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

    def _positions(self, width: int) -> nn.Parameter:
        return nn.Parameter(sincos_table(width, self.img_size // self.patch_size)[None], requires_grad=False)

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
        self._check_images("imgs", imgs)
        seen = imgs if adv_images is None else adv_images
        if seen.shape != imgs.shape:
            raise ValueError(f"adv_images: expected {tuple(imgs.shape)} like imgs, got {tuple(seen.shape)}")
        if noise is None:
            noise = torch.rand(imgs.shape[0], self.num_patches, device=imgs.device)
        ids_shuffle, ids_restore, keep = self.random_masking(noise, mask_ratio)
        latent = self.encode(self.patchify(seen, ids_shuffle[:, :keep]), ids_shuffle[:, :keep])
        pred = self.decode(latent, ids_shuffle, query_start=1)
        loss = self.loss(pred[:, keep:], ids_shuffle[:, keep:], imgs)
        pred = pred.gather(1, ids_restore[:, :, None].expand_as(pred))
        return loss, pred, (ids_restore >= keep).to(noise.dtype), latent

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

    def patchify(self, images: Tensor, ids_keep: Tensor) -> Tensor:
        """The kept patches of images [B,C,H,W]: [B,K,P] in (channel, row, column) order."""
        return patch_gather(images, ids_keep, self.patch_size, impl=self.kernels)

    def encode(self, patches: Tensor, ids_keep: Tensor) -> Tensor:
        """Kept patches [B,K,P] and where they were [B,K] -> latent [B,1+K,D]."""
        tokens = self.patch_embed(patches) + self.pos_embed[0, 1:][ids_keep]
        cls_token = (self.cls_token + self.pos_embed[:, :1]).expand(len(tokens), -1, -1)
        stream = (self._residual(torch.cat([cls_token, tokens], dim=1)), None, None)
        for block in self.blocks:
            stream = recomputed(block, *stream) if self.activation_checkpointing else block(*stream)
        return add_and_norm(*stream, self.norm, self.kernels, self.norm.weight.dtype)[1]

    def reconstruct(self, latent: Tensor, ids_shuffle: Tensor, images: Tensor) -> tuple[Tensor, Tensor]:
        """latent [B,1+K,D], ids_shuffle [B,L], images [B,C,H,W] -> loss, predictions of the removed patches [B,L-K,P]."""
        pred = self.decode(latent, ids_shuffle, query_start=latent.shape[1])
        with stage("loss"):
            return self.loss(pred, ids_shuffle[:, latent.shape[1] - 1 :], images), pred

    def decode(self, latent: Tensor, ids_shuffle: Tensor, query_start: int) -> Tensor:
        """latent [B,1+K,D], ids_shuffle [B,L] -> predictions [B,1+L-query_start,P] for tokens[query_start:] in shuffled order.

        1 is the first patch, 1+K the first removed one.  The last block leaves out the tokens before `query_start`, which are
        needed as keys and values only.
        """
        tokens = self.decoder_embed(latent)
        pos_embed = self.decoder_pos_embed[0]
        tokens = token_restore(tokens, self.mask_token[0, 0], pos_embed, ids_shuffle, impl=self.kernels)
        stream = (self._residual(tokens), None, None)
        for block in self.decoder_blocks[:-1]:
            stream = block(*stream)
        stream = self.decoder_blocks[-1](*stream, query_start)
        return self.decoder_pred(add_and_norm(*stream, self.decoder_norm, self.kernels)[1])

    def loss(self, pred: Tensor, ids: Tensor, images: Tensor) -> Tensor:
        """Mean squared error of predictions [B,M,P] for patches ids [B,M] of images [B,C,H,W]."""
        return masked_patch_loss(pred, images, ids, self.patch_size, self.norm_pix_loss, impl=self.kernels)

    def _residual(self, tokens: Tensor) -> Tensor:
        return tokens if self.residual_dtype is None else tokens.to(self.residual_dtype)

    def _check_images(self, name: str, images: Tensor) -> None:
        expected = (self.patch_embed.proj.in_channels, self.img_size, self.img_size)
        if images.ndim != 4 or images.shape[1:] != expected:
            raise ValueError(f"{name}: expected [B,{','.join(map(str, expected))}], got {tuple(images.shape)}")


def _init_linear(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        nn.init.zeros_(module.bias)
