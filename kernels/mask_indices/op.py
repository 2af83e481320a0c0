"""Random masking: the order in which a mask keeps patches.  Shapes: B batch, L patches."""

from torch import Tensor

from mimir_fast.kernels._shared.registration import check_storage, choose
from mimir_fast.kernels.mask_indices import reference


def mask_indices(noise_BL: Tensor, impl: str = "auto") -> tuple[Tensor, Tensor]:
    """Argsort every row of the noise, and its inverse: a mask that keeps K patches keeps the first K of ids_shuffle.

    formula      ids_shuffle = stable argsort(noise); ids_restore = argsort(ids_shuffle), the rank of every patch
    shapes       noise [B,L] -> ids_shuffle [B,L] int64, ids_restore [B,L] int64
    dtypes       noise in any float dtype
    bytes        noise once from memory, and once per 256 patches of a row from cache; both index tables once
    determinism  exact; equal noise keeps its original order, NaN counts as +inf
    source       He et al., Masked Autoencoders Are Scalable Vision Learners, 2022, section 3

    impl: "triton", "reference" or "auto" (triton on CUDA).  triton takes float storage up to 32 bits.
    Raises ValueError if noise is not a float [B,L] tensor, or an element type or impl is not on offer.
    """
    if noise_BL.ndim != 2 or not noise_BL.is_floating_point():
        raise ValueError(f"noise: expected a float tensor [B,L], got {noise_BL.dtype} {tuple(noise_BL.shape)}")
    if choose(impl, noise_BL) == "triton":
        # Imported here, since CPU-only installations have no Triton.
        from mimir_fast.kernels.mask_indices import kernel

        check_storage(noise=noise_BL)
        return kernel.mask_indices(noise_BL)
    return reference.mask_indices(noise_BL)
