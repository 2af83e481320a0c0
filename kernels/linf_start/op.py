"""Random start of an L-infinity attack.  Shapes: B batch, C channels, H W sides."""

from torch import Tensor

from mimir_fast.kernels._shared.registration import check_floats, check_images, check_indices, check_storage, choose
from mimir_fast.kernels.linf_start import reference


def linf_start(images_BCHW: Tensor, bounds_4C: Tensor, seed: Tensor, impl: str = "auto") -> Tensor:
    """Random start: add uniform noise in [-eps, eps) to the images and clamp to [lo, hi]; no noise tensor is stored.

    formula      clip(x + eps * (2u - 1), lo, hi); u of element n is word n % 4 of Philox-4x32-10 at counter n // 4, keyed by
                 the seed, mapped to [0, 1)
    shapes       images [B,C,H,W], bounds [4,C] (eps, alpha, lo, hi; from linf_bounds), seed [] int64 -> [B,C,H,W]
    dtypes       float storage, or uint8, which is divided by 255; fp32 arithmetic; output in the images' dtype, fp32 for
                 uint8; not differentiable
    bytes        images and output once
    determinism  exact: a function of seed and position, the same on every device and in both implementations
    source       Salmon et al., Parallel Random Numbers: As Easy as 1, 2, 3, 2011

    The seed stays on the device: torch.randint(2**63 - 1, (), generator=g, device=g.device) draws one without a host read.
    impl: "triton", "reference" or "auto" (triton on CUDA).  triton takes float storage up to 32 bits and uint8.
    Raises ValueError if shapes or devices disagree, or an element type or impl is not on offer.
    """
    if images_BCHW.ndim != 4:
        raise ValueError(f"images: expected [B,C,H,W], got {tuple(images_BCHW.shape)}")
    check_images(images_BCHW.device, images_BCHW)
    if bounds_4C.shape != (4, images_BCHW.shape[1]):
        raise ValueError(f"bounds: expected {[4, images_BCHW.shape[1]]}, got {tuple(bounds_4C.shape)}")
    if seed.numel() != 1:
        raise ValueError(f"seed: expected one number, got {tuple(seed.shape)}")
    check_floats(images_BCHW.device, bounds=bounds_4C)
    check_indices(images_BCHW.device, seed=seed)
    if choose(impl, images_BCHW) == "triton":
        # Imported here, since CPU-only installations have no Triton.
        from mimir_fast.kernels.linf_start import kernel

        check_storage(images=images_BCHW, bounds=bounds_4C)
        return kernel.linf_start(images_BCHW, bounds_4C, seed)
    return reference.linf_start(images_BCHW, bounds_4C, seed)
