"""PGD-MAE: the L-infinity attack on the reconstruction.  Shapes: B batch, C channels, H W sides, L patches."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call

Bound = float | Tensor  # one number for all channels, or a tensor [C,1,1]


def linf_start(images: Tensor, start_noise: Tensor, lo: Bound, hi: Bound) -> Tensor:
    """Starting point: the images plus additive noise [B,C,H,W], inside the range of valid pixels."""
    return _clamp(images + start_noise, lo, hi)


def linf_step(images: Tensor, adv: Tensor, grad: Tensor, eps: Bound, alpha: Bound, lo: Bound, hi: Bound) -> Tensor:
    """One ascent step of size alpha along sign(grad), projected on the eps-ball around the images and on [lo, hi].

    A gradient of exactly zero, or NaN (fp16 overflow), leaves the pixel where it was.  All tensors [B,C,H,W].
    """
    delta = _clamp(adv + alpha * grad.sign().nan_to_num(0.0) - images, -eps, eps)
    return _clamp(images + delta, lo, hi)


def reconstruction_loss(model: nn.Module, images: Tensor, mask_ratio: float, noise: Tensor | None) -> Tensor:
    """Loss of reconstructing images [B,C,H,W] from themselves, differentiable in the images only.

    The parameters enter detached, so no weight gradient is ever built, compiled or not.
    """
    frozen = {name: value.detach() for name, value in model.named_parameters()}
    return functional_call(model, frozen, (images,), {"mask_ratio": mask_ratio, "noise": noise})[0]


def pgd_mae(
    model: nn.Module,
    images: Tensor,
    eps: Bound = 8 / 255,
    alpha: Bound = 10 / 255,
    steps: int = 1,
    lo: Bound = 0.0,
    hi: Bound = 1.0,
    mask_ratio: float = 0.75,
    start_noise: Tensor | None = None,
    mask_noise: Sequence[Tensor] | Tensor | None = None,
    loss_scale: float = 1.0,
    loss_fn: Callable[..., Tensor] = reconstruction_loss,
) -> Tensor:
    """Adversarial images that a masked autoencoder reconstructs badly from themselves.

    model          called as model(images, mask_ratio=..., noise=...), first result the loss; in eval mode meanwhile
    images         [B,C,H,W], clean; eps, alpha, lo, hi in the images' units, floats or tensors [C,1,1]
    steps          ascent steps, each under a fresh mask that removes `mask_ratio` of the patches
    start_noise    [B,C,H,W] added first (default: uniform in [-eps, eps]); mask_noise: one [B,L] per step (default: drawn)
    loss_scale     multiplies the loss before its backward pass: fp16 gradients underflow without; the sign ignores it
    loss_fn        (model, images, mask_ratio, noise) -> loss; a compiled `reconstruction_loss`, for instance
    Returns [B,C,H,W], detached, within eps of the images and within [lo, hi].
    Raises ValueError if steps < 0 or mask_noise does not hold one entry per step.  Source: MIMIR, arXiv 2312.04960, section 4.
    """
    if steps < 0:
        raise ValueError(f"steps: expected 0 or more, got {steps}")
    if mask_noise is None:
        mask_noise = [None] * steps
    if len(mask_noise) != steps:
        raise ValueError(f"mask_noise: expected one [B,L] tensor for each of {steps} steps, got {len(mask_noise)}")
    if start_noise is None:
        start_noise = eps * (2 * torch.rand_like(images) - 1)
    was_training = model.training
    model.eval()
    try:
        adv = linf_start(images, start_noise, lo, hi)
        for noise in mask_noise:
            adv.requires_grad_(True)
            with torch.enable_grad():
                loss = loss_fn(model, adv, mask_ratio, noise) * loss_scale
            (grad,) = torch.autograd.grad(loss, adv)
            adv = linf_step(images, adv.detach(), grad, eps, alpha, lo, hi)
    finally:
        model.train(was_training)
    return adv.detach()


def _clamp(x: Tensor, lo: Bound, hi: Bound) -> Tensor:
    if isinstance(lo, Tensor) or isinstance(hi, Tensor):
        lo, hi = (torch.as_tensor(bound, dtype=x.dtype, device=x.device) for bound in (lo, hi))
    return torch.clamp(x, lo, hi)
