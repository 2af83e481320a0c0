"""linf_patch_step in plain PyTorch, with the image's whole gradient stored."""

import torch
from torch import Tensor

from mimir_fast.kernels._shared.bytes import as_floats
from mimir_fast.kernels.masked_patch_loss.reference import assemble, patch_statistics, patchify, predicted, select


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
    """See op.py; [B,C,H,W] in stepped_dtype."""
    images = as_floats(images_BCHW)
    compute = torch.promote_types(images.dtype, torch.float32)
    images, adv = images.to(compute), adv_BCHW.to(compute)
    K, C, p = grad_visible_BKP.shape[1], images.shape[1], patch_size
    ids_shuffle_BL = ids_restore_BL.argsort(dim=1)
    removed = select(patchify(adv, p), ids_shuffle_BL[:, K:])
    hidden = target_gradient(removed, predicted(pred_BMP, p).to(compute), norm_pix_loss)
    grad = torch.cat([grad_visible_BKP.to(compute).unflatten(2, (C, p, p)), hidden], dim=1)
    sign = assemble(select(grad, ids_restore_BL).sign(), images.shape[2] // p)
    eps, alpha, lo, hi = bounds_4C.to(compute)[:, :, None, None, None, None]
    # [B,C,rows,p,columns,p], the shape in which `assemble` gives the sign.
    images, adv = (t.unflatten(3, (-1, p)).unflatten(2, (-1, p)) for t in (images, adv))
    delta = torch.clamp(adv + alpha * sign - images, -eps, eps)
    return torch.clamp(images + delta, lo, hi).to(stepped_dtype(images_BCHW, adv_BCHW)).reshape(images_BCHW.shape)


def stepped_dtype(images: Tensor, adv: Tensor) -> torch.dtype:
    """The result's: that of the images, or of adv where these are bytes."""
    return images.dtype if images.is_floating_point() else adv.dtype


def target_gradient(patches: Tensor, pred: Tensor, norm_pix_loss: bool) -> Tensor:
    """A positive multiple of d |pred - target(patch)|^2 / d patch, for every patch of [B,L,...]."""
    if not norm_pix_loss:
        return patches - pred
    numbers = tuple(range(2, patches.ndim))
    mean, std = patch_statistics(patches)
    target = (patches - mean) / std
    # The target moves with the patch: the gradient goes through its mean and deviation too.  The factor 2 / (std P) of all
    # is positive and left out, for only the sign is used.
    error = target - pred
    along = (error * target).sum(numbers, keepdim=True) / (patches.shape[2:].numel() - 1)
    return error - error.mean(numbers, keepdim=True) - target * along
