"""PGD-MAE's ascent step.  Shapes: B batch, C channels, H W sides, L patches, K kept, M removed, P = C*p*p numbers each."""

import torch
from torch import Tensor

from mimir_fast.kernels._shared.registration import check_floats, check_images, check_indices, check_storage, choose
from mimir_fast.kernels.linf_patch_step import reference
from mimir_fast.kernels.patch_gather.op import check_image_grid

# One number for all channels, or one per channel.
Bound = float | Tensor


def linf_bounds(eps: Bound, alpha: Bound, lo: Bound, hi: Bound, channels: int, device: torch.device | str) -> Tensor:
    """The bounds of an attack as one tensor: eps, alpha, lo and hi of every channel, [4,C] fp32 on the device.

    Each is a number or a tensor of C numbers in any shape.  Make it once per attack, not per step: it copies from the host.
    Raises ValueError naming the one that has another size.
    """
    rows = []
    for name, value in (("eps", eps), ("alpha", alpha), ("lo", lo), ("hi", hi)):
        # In fp32 whatever the images are stored in: rounded to bf16 a radius can be off by 0.2 %.
        row = torch.as_tensor(value, dtype=torch.float32, device=device).flatten()
        if row.numel() not in (1, channels):
            raise ValueError(f"{name}: expected 1 or {channels} numbers, got {row.numel()}")
        rows.append(row.expand(channels))
    return torch.stack(rows)


def linf_patch_step(
    images_BCHW: Tensor,
    adv_BCHW: Tensor,
    grad_visible_BKP: Tensor,
    pred_BMP: Tensor,
    ids_restore_BL: Tensor,
    bounds_4C: Tensor,
    patch_size: int,
    norm_pix_loss: bool,
    impl: str = "auto",
) -> Tensor:
    """PGD step on the reconstruction loss: move adv by alpha * sign(gradient), within eps of the images and in [lo, hi].

    formula      clip(x + clip(adv + alpha * sign(g) - x, +-eps), lo, hi).  A visible patch (ids_restore < K) has its row of
                 grad_visible as g; a removed one has, up to the positive factor that the sign ignores, with t its numbers,
                 t^ = (t - mean)/s, e = t^ - pred:  g = e - mean(e) - t^ <e, t^>/(P-1), or t - pred without norm_pix_loss
    shapes       images, adv [B,C,H,W], grad_visible [B,K,P] in (channel, row, column) order, pred [B,M,P] of the removed
                 patches, rank K first, in (row, column, channel) order, ids_restore [B,L] int64, bounds [4,C] from
                 linf_bounds -> [B,C,H,W]
    dtypes       any float storage, images also uint8, which are divided by 255; at least fp32 arithmetic; output in the images'
                 dtype, in adv's for uint8; not differentiable
    bytes        images, adv and output once, grad_visible once, pred once, ids_restore once
    determinism  exact; a gradient of exactly zero (or NaN) leaves the pixel where it was
    source       MIMIR, arXiv 2312.04960, section 4; the gradient patch by patch is derived in docs/fidelity.md

    impl: "triton", "reference" or "auto" (triton on CUDA).  triton takes float storage up to 32 bits, and uint8.
    Raises ValueError if shapes or devices disagree, an element type or impl is not on offer, or norm_pix_loss is asked of
    patches of a single number.
    """
    L = check_image_grid(images_BCHW, patch_size)
    B, C = images_BCHW.shape[:2]
    P = C * patch_size**2
    # K is grad_visible's own; with another number of dimensions it fails the comparison of shapes below.
    K = grad_visible_BKP.shape[1] if grad_visible_BKP.ndim == 3 else 0
    expected = {
        "adv": images_BCHW.shape,
        "grad_visible": (B, K, P),
        "pred": (B, L - K, P),
        "ids_restore": (B, L),
        "bounds": (4, C),
    }
    given = (adv_BCHW, grad_visible_BKP, pred_BMP, ids_restore_BL, bounds_4C)
    for (name, shape), tensor in zip(expected.items(), given):
        if tensor.shape != shape:
            raise ValueError(f"{name}: expected {list(shape)}, got {tuple(tensor.shape)}")
    # Without a kept patch the encoder saw nothing, and there is no gradient to sign.
    if not 1 <= K <= L:
        raise ValueError(f"grad_visible: expected 1..{L} kept patches, got {K}")
    if norm_pix_loss and P < 2:
        raise ValueError("norm_pix_loss: a patch of one number has no variance; use a larger patch_size")
    floats = {
        "adv": adv_BCHW,
        "grad_visible": grad_visible_BKP,
        "pred": pred_BMP,
        "bounds": bounds_4C,
    }
    check_images(images_BCHW.device, images_BCHW)
    check_floats(images_BCHW.device, **floats)
    check_indices(images_BCHW.device, ids_restore=ids_restore_BL)
    arguments = (
        images_BCHW,
        adv_BCHW,
        grad_visible_BKP,
        pred_BMP,
        ids_restore_BL,
        bounds_4C,
        patch_size,
        norm_pix_loss,
    )
    if choose(impl, images_BCHW) == "triton":
        # Imported here, since CPU-only installations have no Triton.
        from mimir_fast.kernels.linf_patch_step import kernel

        check_storage(images=images_BCHW, **floats)
        return kernel.linf_patch_step(*arguments)
    return reference.linf_patch_step(*arguments)
