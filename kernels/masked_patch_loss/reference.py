"""masked_patch_loss in plain PyTorch, patches of an image and back, and the target of the reconstruction."""

import torch
from torch import Tensor

from mimir_fast.kernels._shared.bytes import as_floats

# Added to a patch's variance before the square root, as in the original implementation of MAE.
VARIANCE_FLOOR = 1e-6


def patchify(images_BCHW: Tensor, patch_size: int) -> Tensor:
    """All patches of images, row by row of the grid: [B,C,H,W] -> [B,L,C,p,p]."""
    # [B,C,rows,p,columns,p]
    grid = images_BCHW.unflatten(3, (-1, patch_size)).unflatten(2, (-1, patch_size))
    return grid.permute(0, 2, 4, 1, 3, 5).flatten(1, 2)


def assemble(patches_BLCpp: Tensor, rows: int) -> Tensor:
    """[B,L,C,p,p] -> [B,C,rows,p,L/rows,p], which reshapes to the image [B,C,rows*p,L/rows*p]: the inverse of `patchify`."""
    return patches_BLCpp.unflatten(1, (rows, -1)).permute(0, 3, 1, 4, 2, 5)


def predicted(pred_BMP: Tensor, patch_size: int) -> Tensor:
    """Predicted patches [B,M,p*p*C], in the decoder's (row, column, channel) order -> [B,M,C,p,p]."""
    return pred_BMP.unflatten(2, (patch_size, patch_size, -1)).permute(0, 1, 4, 2, 3)


def target_patches(images_BCHW: Tensor, patch_size: int) -> Tensor:
    """What the decoder predicts: all patches in (row, column, channel) order, [B,C,H,W] -> [B,L,p*p*C]."""
    return patchify(images_BCHW, patch_size).permute(0, 1, 3, 4, 2).flatten(2)


def predicted_image(patches_BLP: Tensor, patch_size: int, height: int, width: int) -> Tensor:
    """[B,L,p*p*C] -> [B,C,H,W]: the inverse of `target_patches`."""
    grid = assemble(predicted(patches_BLP, patch_size), height // patch_size)
    return grid.reshape(*grid.shape[:2], height, width)


def select(patches: Tensor, ids_BM: Tensor) -> Tensor:
    """Patches ids of [B,L,...]: [B,M,...]."""
    places = ids_BM.reshape(*ids_BM.shape, *[1] * (patches.ndim - 2))
    return patches.gather(1, places.expand(-1, -1, *patches.shape[2:]))


def patch_statistics(patches: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each patch of [B,L,...], both [B,L,1...], with which norm_pix_loss normalises."""
    # Unbiased (divided by P - 1), as in the original implementation of MAE.
    var, mean = torch.var_mean(patches, dim=tuple(range(2, patches.ndim)), keepdim=True)
    return mean, (var + VARIANCE_FLOOR).sqrt()


def masked_patch_loss(
    pred_BMP: Tensor, images_BCHW: Tensor, ids_BM: Tensor, patch_size: int, norm_pix_loss: bool
) -> Tensor:
    """See op.py: pred [B,M,P], images [B,C,H,W], ids [B,M] -> scalar."""
    compute = torch.promote_types(pred_BMP.dtype, torch.float32)
    images = as_floats(images_BCHW)
    target = select(patchify(images, patch_size), ids_BM)
    target = target.to(torch.promote_types(images.dtype, compute))
    if norm_pix_loss:
        mean, std = patch_statistics(target)
        target = (target - mean) / std
    return (predicted(pred_BMP, patch_size).to(compute) - target).square().mean()
