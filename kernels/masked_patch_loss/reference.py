"""masked_patch_loss in plain PyTorch, and the target it is measured against."""

import torch
from torch import Tensor

VARIANCE_FLOOR = 1e-6


def patchify(images_BCHW: Tensor, patch_size: int) -> Tensor:
    """[B,C,H,W] -> [B,L,p*p*C], each patch flattened in (row, column, channel) order."""
    B, C, H, W = images_BCHW.shape
    p = patch_size
    return images_BCHW.reshape(B, C, H // p, p, W // p, p).permute(0, 2, 4, 3, 5, 1).reshape(B, -1, p * p * C)


def unpatchify(patches_BLP: Tensor, patch_size: int, height: int, width: int) -> Tensor:
    """[B,L,p*p*C] -> [B,C,H,W]: the inverse of `patchify`."""
    B, p = patches_BLP.shape[0], patch_size
    grid = patches_BLP.reshape(B, height // p, width // p, p, p, -1)
    return grid.permute(0, 5, 1, 3, 2, 4).reshape(B, -1, height, width)


def patch_statistics(patches_BLP: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and floored standard deviation of each patch, both [B,L,1]: what norm_pix_loss normalises with."""
    var, mean = torch.var_mean(patches_BLP, dim=-1, keepdim=True)
    return mean, (var + VARIANCE_FLOOR).sqrt()


def masked_patch_loss(
    pred_BLP: Tensor, images_BCHW: Tensor, mask_BL: Tensor, patch_size: int, norm_pix_loss: bool
) -> Tensor:
    """See op.py: pred [B,L,P], images [B,C,H,W], mask [B,L] -> scalar."""
    compute = torch.promote_types(pred_BLP.dtype, torch.float32)
    target_BLP = patchify(images_BCHW, patch_size).to(torch.promote_types(images_BCHW.dtype, compute))
    if norm_pix_loss:
        mean, std = patch_statistics(target_BLP)
        target_BLP = (target_BLP - mean) / std
    error_BL = (pred_BLP.to(compute) - target_BLP).square().mean(dim=-1)
    mask_BL = mask_BL.to(error_BL.dtype)
    return (error_BL * mask_BL).sum() / mask_BL.sum()
