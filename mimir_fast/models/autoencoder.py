"""Base class of masked autoencoders: what a family must provide, and what all families share.

Shapes: B batch, C channels, H W sides, L patches, K kept patches, P = p*p*C numbers per patch, D encoder width;
S prefix tokens, which stand before the patches (the class token).
"""

from abc import ABC, abstractmethod

import numpy as np
import torch
from torch import Tensor, nn

from mimir_fast.kernels import mask_indices, masked_patch_loss
from mimir_fast.models.layers import check_images
from mimir_fast.training.stages import stage


class MaskedAutoencoder(nn.Module, ABC):
    """Encode the patches that a random mask leaves, predict the others.

    A family provides `visible`, `encode` and `decode`, with masks_on_host `host_plan` too, and these attributes:

    img_size, in_chans   the images are [B,in_chans,img_size,img_size]
    patch_size           side of a patch, the unit of the mask; num_patches: L of an image
    prefix_tokens        S, the number of tokens in the latent before those of patches: 1 for a class token, 0 without
    masks_on_host        the noise of a training's masks is drawn in host memory, for `host_plan`
    norm_pix_loss        the loss takes every target patch normalised by its own mean and deviation
    kernels              implementation of the operations in mimir_fast.kernels
    compat               "original" where it computes what the original does, else None: models/compat.py
    mask_token           the parameter that stands for removed patches; by its name a file is recognised as an autoencoder's
    """

    img_size: int
    in_chans: int
    patch_size: int
    num_patches: int
    prefix_tokens: int = 1
    masks_on_host: bool = False
    norm_pix_loss: bool
    kernels: str
    compat: str | None = None
    mask_token: nn.Parameter

    @abstractmethod
    def visible(self, images: Tensor, ids_keep: Tensor) -> Tensor:
        """What `encode` takes of images [B,C,H,W] whose patches ids_keep [B,K] are kept: these patches, [B,K,P], or the images
        themselves where the family's record says that masking is of "images"."""

    @abstractmethod
    def encode(self, visible: Tensor, ids_keep: Tensor, plan: Tensor | None = None) -> Tensor:
        """What `visible` returns, and which patches are kept [B,K] -> latent [B,S+K,D]: prefix tokens, then kept patches.

        The patches' order is that of ids_keep, or another that `decode` undoes.
        plan: with masks_on_host, what `host_plan` made of these patches, on the device; None: made now, from ids_keep.
        """

    @abstractmethod
    def decode(self, latent: Tensor, ids_shuffle: Tensor, query_start: int) -> Tensor:
        """latent [B,S+K,D], ids_shuffle [B,L] -> predictions [B,S+L-query_start,P] for tokens[query_start:] in shuffled order.

        query_start   S, the first patch (everything is predicted), or S+K, the first removed patch
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
        Returns loss (scalar), pred [B,L,P], mask [B,L] (1 = removed), latent [B,S+K,D] (see `encode`).
        Raises ValueError naming the argument that does not fit.
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
        pred = self.decode(latent, ids_shuffle, query_start=self.prefix_tokens)
        # Kept patches are predicted for those who look at them; the loss leaves them out.
        loss = self.loss(pred[:, keep:], ids_shuffle[:, keep:], imgs)
        # From shuffled order, kept patches first, back to raster order.
        pred = pred.gather(1, ids_restore[:, :, None].expand_as(pred))
        # A row for each image, also where one mask is all images'.
        mask = (ids_restore >= keep).to(noise.dtype).expand(len(imgs), -1)
        return loss, pred, mask, latent

    def noise_shape(self, batch: int) -> tuple[int, int]:
        """[rows, L] of the noise that decides the mask: a row for each image, or a single one where the family masks the whole
        batch alike."""
        return batch, self.num_patches

    def host_plan(self, noise_BL: np.ndarray, mask_ratio: float) -> np.ndarray | None:
        """With masks_on_host: what `encode` needs of a mask beside its patches, from its noise, as numbers of one shape and
        type for all masks of a ratio; None: this mask has none of that shape, and a training draws another."""
        raise NotImplementedError(type(self).__name__)

    def kept(self, mask_ratio: float) -> int:
        """K, the number of patches that a mask leaves.  Raises ValueError for a ratio that leaves none."""
        if not 0 <= mask_ratio < 1:
            raise ValueError(f"mask_ratio: expected 0 <= ratio < 1, got {mask_ratio}")
        # Rounded down, as in the original.
        keep = int(self.num_patches * (1 - mask_ratio))
        if keep < 1:
            raise ValueError(f"mask_ratio: {mask_ratio} keeps none of {self.num_patches} patches; lower it")
        return keep

    def random_masking(self, noise_BL: Tensor, mask_ratio: float) -> tuple[Tensor, Tensor, int]:
        """noise [B,L], removed share -> ids_shuffle [B,L], kept patches first; ids_restore [B,L], its inverse; K, how many."""
        keep = self.kept(mask_ratio)
        if noise_BL.ndim != 2 or noise_BL.shape[1] != self.num_patches:
            raise ValueError(f"noise: expected [B,{self.num_patches}], got {tuple(noise_BL.shape)}")
        return *mask_indices(noise_BL, impl=self.kernels), keep

    def reconstruct(self, latent: Tensor, ids_shuffle: Tensor, images: Tensor) -> tuple[Tensor, Tensor]:
        """latent [B,S+K,D], ids_shuffle [B,L], images [B,C,H,W] -> loss, predictions of the removed patches [B,L-K,P].

        The predictions are detached: the loss alone has a gradient.
        """
        keep = latent.shape[1] - self.prefix_tokens
        # Of the removed patches alone: the loss wants no others, and the decoder's last block need not compute them.
        pred = self.decode(latent, ids_shuffle, query_start=latent.shape[1])
        with stage("loss"):
            loss = self.loss(pred, ids_shuffle[:, keep:], images)
        # With its graph, compiled code would add a gradient of zeros to the loss's.
        return loss, pred.detach()

    def loss(self, pred: Tensor, ids: Tensor, images: Tensor) -> Tensor:
        """Mean squared error of predictions [B,M,P] for patches ids [B,M] of images [B,C,H,W]."""
        return masked_patch_loss(pred, images, ids, self.patch_size, self.norm_pix_loss, impl=self.kernels)
