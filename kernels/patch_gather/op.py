"""Visible patches of an image.  Shapes: B batch, C channels, H W sides, L patches, K kept, P = C*p*p numbers per patch."""

from mimir_fast.kernels.patch_gather import reference
from torch import Tensor


def check_image_grid(images_BCHW: Tensor, patch_size: int) -> int:
    """Number of patches L of a batch of images; raises ValueError unless both sides are multiples of the patch size."""
    if images_BCHW.ndim != 4:
        raise ValueError(f"images: expected [B,C,H,W], got {tuple(images_BCHW.shape)}")
    height, width = images_BCHW.shape[2:]
    if patch_size < 1 or height % patch_size or width % patch_size:
        raise ValueError(f"patch_size: {patch_size} does not divide the image sides {height}x{width}")
    return (height // patch_size) * (width // patch_size)


def patch_gather(images_BCHW: Tensor, ids_keep_BK: Tensor, patch_size: int) -> Tensor:
    """Cut out the kept patches and flatten each in (channel, row, column) order, the layout of a convolution's weight.

    formula      out[b,k] = flatten(patch ids_keep[b,k] of images[b])
    shapes       images [B,C,H,W], ids_keep [B,K] int64 (distinct within a row) -> [B,K,P]
    dtypes       output has the images' dtype; differentiable in the images
    bytes        the kept patches read once and written once, the indices read once
    determinism  exact; kept patches are distinct, so the backward scatter writes every pixel at most once
    source       Dosovitskiy et al., An Image Is Worth 16x16 Words, 2021, equation 1, restricted to visible patches

    Raises ValueError if shapes disagree or the patch size does not divide the image.
    """
    check_image_grid(images_BCHW, patch_size)
    if ids_keep_BK.ndim != 2 or ids_keep_BK.shape[0] != images_BCHW.shape[0]:
        raise ValueError(f"ids_keep: expected [{images_BCHW.shape[0]},K], got {tuple(ids_keep_BK.shape)}")
    return reference.patch_gather(images_BCHW, ids_keep_BK, patch_size)
