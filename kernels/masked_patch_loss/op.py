"""The reconstruction loss.  Shapes: B batch, C channels, H W sides, L patches, M removed, P = C*p*p numbers per patch."""

from torch import Tensor

from mimir_fast.kernels._shared.registration import check_floats, check_images, check_indices, check_storage, choose
from mimir_fast.kernels.masked_patch_loss import reference
from mimir_fast.kernels.patch_gather.op import check_image_grid


def masked_patch_loss(
    pred_BMP: Tensor, images_BCHW: Tensor, ids_BM: Tensor, patch_size: int, norm_pix_loss: bool, impl: str = "auto"
) -> Tensor:
    """Reconstruction loss of a masked autoencoder: mean squared error over the removed patches.

    formula      t = patch ids[b,m] of images[b] in (row, column, channel) order, uint8 divided by 255; with norm_pix_loss
                 t = (t - mean) / sqrt(var + 1e-6), var unbiased; loss = mean over b, m, P of (pred - t)^2
    shapes       pred [B,M,P], images [B,C,H,W], ids [B,M] int64, distinct within a row -> scalar
    dtypes       any float storage, images also uint8, at least fp32 accumulation; differentiable in pred and in float
                 images (through the target)
    bytes        pred, its patches of the images and ids read once, one fp32 per patch written and read; backward: the same
                 reads and the gradient written once (for images: twice)
    determinism  sums in a fixed order
    source       He et al., Masked Autoencoders Are Scalable Vision Learners, 2022, section 3, "Reconstruction target"

    impl: "triton", "reference" or "auto" (triton on CUDA).  triton takes float storage up to 32 bits and copies images
    that are not contiguous.
    Raises ValueError if shapes or devices disagree, no patch is removed, an element type or impl is not on offer, or
    norm_pix_loss is asked of patches of a single number.
    """
    L = check_image_grid(images_BCHW, patch_size)
    B, C = images_BCHW.shape[:2]
    M, P = ids_BM.shape[-1], C * patch_size**2
    if ids_BM.shape != (B, M) or not 1 <= M <= L:
        raise ValueError(f"ids: expected [{B},M] with M in 1..{L} removed patches, got {tuple(ids_BM.shape)}")
    if pred_BMP.shape != (B, M, P):
        raise ValueError(f"pred: expected {[B, M, P]}, got {tuple(pred_BMP.shape)}")
    if norm_pix_loss and P < 2:
        raise ValueError("norm_pix_loss: a patch of one number has no variance; use a larger patch_size")
    check_floats(pred_BMP.device, pred=pred_BMP)
    check_images(pred_BMP.device, images_BCHW)
    check_indices(pred_BMP.device, ids=ids_BM)
    if choose(impl, pred_BMP) == "triton":
        # Imported here, since CPU-only installations have no Triton.
        from mimir_fast.kernels.masked_patch_loss import kernel

        check_storage(pred=pred_BMP, images=images_BCHW)
        return kernel.masked_patch_loss(pred_BMP, images_BCHW, ids_BM, patch_size, norm_pix_loss)
    return reference.masked_patch_loss(pred_BMP, images_BCHW, ids_BM, patch_size, norm_pix_loss)
