"""Samples: a few images of the last step, saved beside the checkpoints for the report."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mimir_fast.checkpoints.atomic import write_atomically
from mimir_fast.kernels._shared.bytes import as_floats
from mimir_fast.kernels.masked_patch_loss.reference import patch_statistics, predicted_image, target_patches
from mimir_fast.training.pretrain_step import PretrainOutput

SAMPLES = 8


def reconstruct(pred_BMP: Tensor, ids_BM: Tensor, images_BCHW: Tensor, patch_size: int, norm_pix_loss: bool) -> Tensor:
    """Images [B,C,H,W] with predictions [B,M,P] in place of the patches ids [B,M].

    norm_pix_loss: predictions are of normalised patches, and are scaled with the clean patch's mean and deviation.
    """
    patches_BLP = target_patches(images_BCHW.float(), patch_size)
    if norm_pix_loss:
        # Those of the clean patches, which the model does not know: the picture shows more than it predicts.
        mean, std = (t.gather(1, ids_BM[:, :, None]) for t in patch_statistics(patches_BLP))
        pred_BMP = pred_BMP * std + mean
    filled_BLP = patches_BLP.scatter(1, ids_BM[:, :, None].expand_as(pred_BMP), pred_BMP.float())
    return predicted_image(filled_BLP, patch_size, *images_BCHW.shape[2:])


@torch.no_grad()
def save_samples(
    path: Path,
    images: Tensor,
    output: PretrainOutput,
    patch_size: int,
    norm_pix_loss: bool,
    mean: tuple[float, ...] | None,
    std: tuple[float, ...] | None,
    position: dict,
) -> None:
    """Write up to eight images of a step as arrays in [0,1]: clean, adv, recon [n,3,H,W], mask [n,L] (1 = removed).

    mean, std   per channel, the normalisation to undo; None: there is none
    position    epoch, update and eps_255, which are stored as well
    """
    images, adv, pred, ids = (t[:SAMPLES] for t in (images, output.adv, output.pred, output.ids_removed))
    # Without an attack they are the batch's own.
    adv = as_floats(adv)
    # A family may mask the whole batch alike, with one row.
    ids = ids.expand(len(images), -1)
    mask = torch.zeros(len(images), images[0, 0].numel() // patch_size**2, device=images.device).scatter(1, ids, 1.0)
    pictures = {"clean": images, "adv": adv, "recon": reconstruct(pred, ids, images, patch_size, norm_pix_loss)}
    if mean is not None and std is not None:
        mean_C11, std_C11 = (torch.tensor(values, device=images.device).view(-1, 1, 1) for values in (mean, std))
        pictures = {name: value * std_C11 + mean_C11 for name, value in pictures.items()}
    arrays: dict[str, Any] = {name: value.float().clamp(0, 1).cpu().numpy() for name, value in pictures.items()}
    arrays |= {"mask": mask.cpu().numpy(), "patch_size": patch_size, **position}
    write_atomically(path, lambda file: np.savez(file, **arrays))
