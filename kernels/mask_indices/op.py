"""Which patches a random mask keeps.  Shapes: B batch, L patches, K kept patches."""

from mimir_fast.kernels.mask_indices import reference
from mimir_fast.kernels.registration import check_storage, choose
from torch import Tensor


def mask_indices(noise_BL: Tensor, keep: int, impl: str = "auto") -> tuple[Tensor, Tensor, Tensor]:
    """Rank every row of the noise and keep its `keep` smallest entries.

    formula      ids = stable argsort(noise); ids_keep = ids[:K]; ids_restore = argsort(ids); mask = ids_restore >= K
    shapes       noise [B,L] -> ids_keep [B,K] int64, ids_restore [B,L] int64, mask [B,L] (1 = removed)
    dtypes       noise in any float dtype; the mask has the noise's dtype
    bytes        noise twice (the second time from cache), both index tables once, the mask once
    determinism  exact; equal noise keeps its original order, NaN comes last
    source       He et al., Masked Autoencoders Are Scalable Vision Learners, 2022, section 3

    impl: "triton", "reference" or "auto" (triton on CUDA).  triton takes float storage up to 32 bits.
    Raises ValueError if noise is not a float [B,L] tensor, keep lies outside 1..L, or an element type or impl is not on
    offer.
    """
    if noise_BL.ndim != 2 or not noise_BL.is_floating_point():
        raise ValueError(f"noise: expected a float tensor [B,L], got {noise_BL.dtype} {tuple(noise_BL.shape)}")
    if not 1 <= keep <= noise_BL.shape[1]:
        raise ValueError(f"keep: expected 1..{noise_BL.shape[1]} patches, got {keep}; lower the mask ratio")
    if choose(impl, noise_BL) == "triton":
        from mimir_fast.kernels.mask_indices import kernel

        check_storage(noise=noise_BL)
        return kernel.mask_indices(noise_BL, keep)
    return reference.mask_indices(noise_BL, keep)
