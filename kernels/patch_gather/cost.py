"""Costs of patch_gather's operators; see kernels/_shared/cost.py."""

from torch import Tensor

from mimir_fast.kernels._shared.cost import Cost, size


def patch_gather(results: list[Tensor], images_BCHW: Tensor, ids_keep_BK: Tensor, *_) -> Cost:
    """The kept patches are read in the images' storage and written in the output's, the indices read once."""
    (out_BKP,) = results
    return Cost(out_BKP.numel() * images_BCHW.element_size() + size(out_BKP, ids_keep_BK))
