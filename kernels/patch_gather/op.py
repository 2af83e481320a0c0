"""Gather of the visible patches.  Shapes: B batch, C channels, H W sides, L patches, K kept, P = C*p*p numbers per patch."""

import torch
from torch import Tensor

from mimir_fast.kernels._shared.registration import check_images, check_indices, check_storage, choose
from mimir_fast.kernels.patch_gather import reference


def check_image_grid(images_BCHW: Tensor, patch_size: int) -> int:
    """Number of patches L of a batch of images; raises ValueError unless both sides are multiples of the patch size."""
    if images_BCHW.ndim != 4:
        raise ValueError(f"images: expected [B,C,H,W], got {tuple(images_BCHW.shape)}")
    height, width = images_BCHW.shape[2:]
    if patch_size < 1 or height % patch_size or width % patch_size:
        raise ValueError(f"patch_size: {patch_size} does not divide the image sides {height}x{width}")
    return (height // patch_size) * (width // patch_size)


def patch_gather(
    images_BCHW: Tensor,
    ids_keep_BK: Tensor,
    patch_size: int,
    offset: float = 0.0,
    dtype: torch.dtype | None = None,
    impl: str = "auto",
) -> Tensor:
    """Gather the kept patches, each flattened in (channel, row, column) order, the layout of a convolution's weight.

    formula      out[b,k] = flatten(patch ids_keep[b,k] of images[b]) - offset; uint8 images are divided by 255 first
    shapes       images [B,C,H,W], ids_keep [B,K] int64 (distinct within a row) -> [B,K,P]
    dtypes       float or uint8 storage, at least fp32 arithmetic, output in `dtype` (default: the images', fp32 for uint8):
                 an offset of 0.5 halves what rounding to 16 bits costs; differentiable in float images
    bytes        the kept patches read once and written once, the indices read once; backward: the gradient read once, the
                 indices once per tile of 1024 pixels (from cache), the images' gradient written once
    determinism  exact; kept patches are distinct, so the backward scatter writes every pixel once
    source       Dosovitskiy et al., An Image Is Worth 16x16 Words, 2021, equation 1, restricted to visible patches

    impl: "triton", "reference" or "auto" (triton on CUDA).  triton takes float storage up to 32 bits and uint8.
    Raises ValueError if shapes or devices disagree, the patch size does not divide the image, or an element type or impl
    is not on offer.
    """
    check_image_grid(images_BCHW, patch_size)
    if ids_keep_BK.ndim != 2 or ids_keep_BK.shape[0] != images_BCHW.shape[0]:
        raise ValueError(f"ids_keep: expected [{images_BCHW.shape[0]},K], got {tuple(ids_keep_BK.shape)}")
    check_images(images_BCHW.device, images_BCHW)
    check_indices(images_BCHW.device, ids_keep=ids_keep_BK)
    # uint8 pixels are divided by 255, and need a float type.
    if dtype is None:
        dtype = images_BCHW.dtype if images_BCHW.is_floating_point() else torch.float32
    if not dtype.is_floating_point:
        raise ValueError(f"dtype: expected a float type, got {dtype}")
    if choose(impl, images_BCHW) == "triton":
        # Imported here, since CPU-only installations have no Triton.
        from mimir_fast.kernels.patch_gather import kernel

        check_storage(images=images_BCHW)
        return kernel.patch_gather(images_BCHW, ids_keep_BK, patch_size, offset, dtype)
    return reference.patch_gather(images_BCHW, ids_keep_BK, patch_size, offset, dtype)
