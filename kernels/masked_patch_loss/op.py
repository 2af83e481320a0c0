"""The reconstruction loss.  Shapes: B batch, C channels, H W sides, L patches, P = C*p*p numbers per patch."""

from mimir_fast.kernels.masked_patch_loss import reference
from mimir_fast.kernels.patch_gather.op import check_image_grid
from mimir_fast.kernels.registration import check_storage, choose
from torch import Tensor


def masked_patch_loss(
    pred_BLP: Tensor, images_BCHW: Tensor, mask_BL: Tensor, patch_size: int, norm_pix_loss: bool, impl: str = "auto"
) -> Tensor:
    """Mean squared error between predicted patches and the image's, over removed patches only.

    formula      t = patch of the image in (row, column, channel) order; with norm_pix_loss t = (t - mean) / sqrt(var + 1e-6),
                 var unbiased; loss = sum_bl mask * mean_P (pred - t)^2 / sum_bl mask
    shapes       pred [B,L,P], images [B,C,H,W], mask [B,L] (1 = removed) -> scalar
    dtypes       any float storage, at least fp32 accumulation; differentiable in pred and in images (through the target)
    bytes        pred and images read where the mask is set, mask 2x, one fp32 per patch written and read; backward: the same
                 reads and the gradient written once
    determinism  sums in a fixed order
    source       He et al., Masked Autoencoders Are Scalable Vision Learners, 2022, section 3, "Reconstruction target"

    impl: "triton", "reference" or "auto" (triton on CUDA).  triton takes float storage up to 32 bits (images also
    uint8) and copies images that are not contiguous.
    Raises ValueError if shapes or devices disagree, an element type or impl is not on offer, or norm_pix_loss is asked
    of patches of a single number.
    """
    L = check_image_grid(images_BCHW, patch_size)
    B, C = images_BCHW.shape[:2]
    expected = (B, L, C * patch_size**2)
    if pred_BLP.shape != expected:
        raise ValueError(f"pred: expected {list(expected)}, got {tuple(pred_BLP.shape)}")
    if mask_BL.shape != (B, L):
        raise ValueError(f"mask: expected {[B, L]}, got {tuple(mask_BL.shape)}")
    if norm_pix_loss and expected[2] < 2:
        raise ValueError("norm_pix_loss: a patch of one number has no variance; use a larger patch_size")
    if choose(impl, pred_BLP) == "triton":
        from mimir_fast.kernels.masked_patch_loss import kernel

        check_storage(pred=pred_BLP, images=images_BCHW)
        return kernel.masked_patch_loss(pred_BLP, images_BCHW, mask_BL, patch_size, norm_pix_loss)[0]
    return reference.masked_patch_loss(pred_BLP, images_BCHW, mask_BL, patch_size, norm_pix_loss)
