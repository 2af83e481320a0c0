"""Costs of masked_patch_loss's operators; see kernels/_shared/cost.py."""

from torch import Tensor

from mimir_fast.kernels._shared.cost import Cost, size


def masked_patch_loss(results: list[Tensor], pred_BMP: Tensor, images_BCHW: Tensor, ids_BM: Tensor, *_) -> Cost:
    """Predictions, as many numbers of the images, indices; one fp32 number per patch is written and read."""
    return Cost(_read(pred_BMP, images_BCHW, ids_BM) + 2 * 4 * ids_BM.numel())


def masked_patch_loss_grad_pred(results: list[Tensor], grad: Tensor, pred_BMP: Tensor, images: Tensor, ids: Tensor, *_):
    return Cost(_read(pred_BMP, images, ids) + size(*results))


def masked_patch_loss_grad_images(results: list[Tensor], grad: Tensor, pred: Tensor, images: Tensor, ids: Tensor, *_):
    """The images' gradient is cleared, then written where patches are predicted."""
    return Cost(_read(pred, images, ids) + size(*results) + pred.numel() * images.element_size())


def _read(pred_BMP: Tensor, images_BCHW: Tensor, ids_BM: Tensor) -> int:
    return size(pred_BMP, ids_BM) + pred_BMP.numel() * images_BCHW.element_size()
