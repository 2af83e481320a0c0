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
    pred_BMP: Tensor, images_BCHW: Tensor, ids_BM: Tensor, patch_size: int, norm_pix_loss: bool
) -> Tensor:
    """See op.py: pred [B,M,P], images [B,C,H,W], ids [B,M] -> scalar."""
    compute = torch.promote_types(pred_BMP.dtype, torch.float32)
    patches_BLP = patchify(images_BCHW, patch_size)
    target_BMP = patches_BLP.gather(1, ids_BM[:, :, None].expand_as(pred_BMP))
    target_BMP = target_BMP.to(torch.promote_types(images_BCHW.dtype, compute))
    if norm_pix_loss:
        mean, std = patch_statistics(target_BMP)
        target_BMP = (target_BMP - mean) / std
    return (pred_BMP.to(compute) - target_BMP).square().mean()
