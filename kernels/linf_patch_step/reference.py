"""linf_patch_step in plain PyTorch, by way of the whole gradient image."""

import torch
from mimir_fast.kernels.masked_patch_loss.reference import patch_statistics, patchify, unpatchify
from torch import Tensor


def linf_patch_step(
    images_BCHW: Tensor,
    adv_BCHW: Tensor,
    grad_visible_BKP: Tensor,
    pred_BMP: Tensor,
    ids_restore_BL: Tensor,
    bounds_4C: Tensor,
    patch_size: int,
    norm_pix_loss: bool,
) -> Tensor:
    """See op.py; [B,C,H,W] in the images' dtype."""
    compute = torch.promote_types(images_BCHW.dtype, torch.float32)
    images, adv = images_BCHW.to(compute), adv_BCHW.to(compute)
    K, sides, C = grad_visible_BKP.shape[1], images.shape[2:], images.shape[1]
    patches_BLP = patchify(adv, patch_size)
    ids_shuffle_BL = ids_restore_BL.argsort(dim=1)
    removed_BMP = patches_BLP.gather(1, ids_shuffle_BL[:, K:, None].expand_as(pred_BMP))
    hidden_BMP = target_gradient(removed_BMP, pred_BMP.to(compute), norm_pix_loss)
    visible_BKP = (
        grad_visible_BKP.to(compute).unflatten(2, (C, -1)).transpose(2, 3).flatten(2)
    )  # (row, column, channel)
    grad_BLP = torch.cat([visible_BKP, hidden_BMP], dim=1)
    grad_BLP = grad_BLP.gather(1, ids_restore_BL[:, :, None].expand_as(grad_BLP))
    eps, alpha, lo, hi = bounds_4C.to(compute)[:, :, None, None]
    sign = unpatchify(grad_BLP.sign(), patch_size, *sides)
    delta = torch.clamp(adv + alpha * sign - images, -eps, eps)
    return torch.clamp(images + delta, lo, hi).to(images_BCHW.dtype)


def target_gradient(patches_BLP: Tensor, pred_BLP: Tensor, norm_pix_loss: bool) -> Tensor:
    """A positive multiple of d |pred - target(patch)|^2 / d patch, for every patch; [B,L,P]."""
    if not norm_pix_loss:
        return patches_BLP - pred_BLP
    mean, std = patch_statistics(patches_BLP)
    target_BLP = (patches_BLP - mean) / std
    error_BLP = target_BLP - pred_BLP
    along = (error_BLP * target_BLP).sum(dim=-1, keepdim=True) / (error_BLP.shape[-1] - 1)
    return error_BLP - error_BLP.mean(dim=-1, keepdim=True) - target_BLP * along
