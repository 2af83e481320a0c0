"""PGD-MAE: the L-infinity attack on the reconstruction.  Shapes: B batch, C channels, H W sides, L patches, K kept.

The loss of reconstructing an image from itself has two gradients: through the encoder for the kept patches, through the
target for the removed ones.  Where the encoder is given the kept patches alone (masking "patches" in the family's record), only
the first is differentiated by autograd, on these patches; the second has a closed form, taken where the pixels are moved
(mimir_fast.kernels.linf_patch_step).  No gradient image exists.  Where it is given whole images, both gradients may meet in a
pixel: autograd differentiates the whole image.
"""

import copy
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mimir_fast.attacks.linf import gradient, linf_step, starting_point
from mimir_fast.kernels import linf_bounds, linf_patch_step
from mimir_fast.kernels.linf_patch_step.op import Bound
from mimir_fast.models import MaskedAutoencoder
from mimir_fast.models.families import family_of

__all__ = [
    "MaeAttackFunctions",
    "ascend_reconstruction",
    "frozen_twin",
    "image_reconstruction",
    "linf_bounds",
    "pgd_mae",
    "plain_functions",
    "reconstruction",
    "starting_point",
]


def frozen_twin(model: nn.Module) -> nn.Module:
    """The same module over the same memory with nothing to train: it follows every in-place update of `model`."""
    # deepcopy takes what `memo` holds in place of a copy: new parameters over the old memory, and the same buffers.
    shared = {id(p): nn.Parameter(p.detach(), requires_grad=False) for p in model.parameters()}
    return copy.deepcopy(model, memo=shared | {id(b): b for b in model.buffers()})


def reconstruction(
    model: MaskedAutoencoder, patches: Tensor, ids_shuffle: Tensor, images: Tensor, *plan: Tensor
) -> tuple[Tensor, Tensor]:
    """Loss and predictions [B,L-K,P], detached, from the kept patches [B,K,P] of images [B,C,H,W]; compile this one.

    plan: nothing, or one of MaskedAutoencoder.encode.
    """
    latent = model.encode(patches, ids_shuffle[:, : patches.shape[1]], *plan)
    return model.reconstruct(latent, ids_shuffle, images)


def image_reconstruction(
    model: MaskedAutoencoder, images: Tensor, ids_shuffle: Tensor, keep: int, *plan: Tensor
) -> Tensor:
    """The same loss from whole images [B,C,H,W], of whose patches the first `keep` of ids_shuffle [B,L] are kept."""
    ids_keep = ids_shuffle[:, :keep]
    latent = model.encode(model.visible(images, ids_keep), ids_keep, *plan)
    return model.reconstruct(latent, ids_shuffle, images)[0]


class MaeAttackFunctions(NamedTuple):
    """What an attack computes with: as they are, or compiled (mimir_fast.training.compilation).

    loss   `reconstruction` or `image_reconstruction`; step, accordingly: linf_patch_step or linf_step
    """

    loss: Callable[..., Any] = reconstruction
    start: Callable[..., Tensor] = starting_point
    step: Callable[..., Tensor] = linf_patch_step


def by_patches(model: MaskedAutoencoder) -> bool:
    """Whether the attack differentiates the kept patches of this model's family, and not whole images."""
    return family_of(model).masking == "patches"


def plain_functions(model: MaskedAutoencoder) -> MaeAttackFunctions:
    """The attack's functions for a model, as they are."""
    if by_patches(model):
        return MaeAttackFunctions()
    return MaeAttackFunctions(loss=image_reconstruction, step=linf_step)


def pgd_mae(
    model: MaskedAutoencoder,
    images: Tensor,
    eps: Bound = 8 / 255,
    alpha: Bound = 10 / 255,
    steps: int = 1,
    lo: Bound = 0.0,
    hi: Bound = 1.0,
    mask_ratio: float = 0.75,
    start_noise: Tensor | None = None,
    mask_noise: Sequence[Tensor] | Tensor | None = None,
) -> Tensor:
    """PGD-MAE: adversarial images that a masked autoencoder reconstructs badly from themselves.

    images         [B,C,H,W], clean; any float type, on the model's device
    eps, alpha     radius of the L-infinity ball and step size, in the images' units (8/255 where pixels are in [0,1])
    lo, hi         valid range of the pixels.  eps, alpha, lo, hi: a number each, or a tensor of C numbers (normalised images)
    steps          ascent steps, each under a fresh mask that removes `mask_ratio` of the patches
    start_noise    [B,C,H,W], added to the images before the first step; None: uniform in [-eps, eps]
    mask_noise     [steps,B,L] or one [B,L] per step: the patches with the smallest numbers stay; None: uniform draws
    Returns [B,C,H,W], detached, within eps of the images and within [lo, hi] (after at least one step).  The model's
    parameters get no gradient, and its mode (train or eval) is left as it is.
    Raises ValueError naming the argument if steps < 0, a bound or a noise has another size, or eps or alpha is negative.
    Source: MIMIR, arXiv 2312.04960, section 4.
    """
    if images.ndim != 4 or not images.is_floating_point():
        raise ValueError(f"images: expected floats [B,C,H,W], got {images.dtype} {tuple(images.shape)}")
    if start_noise is not None and start_noise.shape != images.shape:
        raise ValueError(f"start_noise: expected {tuple(images.shape)} like images, got {tuple(start_noise.shape)}")
    for name, value in (("eps", eps), ("alpha", alpha)):
        # numbers alone: to look at a tensor would wait for its device
        if not isinstance(value, Tensor) and value < 0:
            raise ValueError(f"{name}: expected 0 or more, got {value}")
    bounds = linf_bounds(eps, alpha, lo, hi, images.shape[1], images.device)
    return ascend_reconstruction(model, images, bounds, steps, mask_ratio, start_noise, mask_noise)


def ascend_reconstruction(
    model: MaskedAutoencoder,
    images: Tensor,
    bounds: Tensor,
    steps: int = 1,
    mask_ratio: float = 0.75,
    start: Tensor | None = None,
    mask_noise: Sequence[Tensor] | Tensor | None = None,
    loss_scale: float = 1.0,
    functions: MaeAttackFunctions | None = None,
    plans: Sequence[Tensor] | None = None,
) -> Tensor:
    """PGD-MAE with everything decided by the caller: what the training step and `pgd_mae` run.

    images         [B,C,H,W], clean, floats; uint8 too (255 for 1) where the attack works on patches
    bounds         [4,C] eps, alpha, lo, hi of every channel in the images' units (linf_bounds): made once, since their
                   numbers are copied from the host
    start          see `starting_point` (default: a seed drawn from torch's generator); mask_noise: one [B,L] per step
    loss_scale     multiplies the loss before its backward pass: fp16 gradients underflow without; the sign ignores it
    functions      default: `plain_functions` of the model.  A compiled loss computes every gradient that it could be asked
                   for: give it a model without trainable parameters (`frozen_twin`), or weight gradients are computed as well
    plans          of every step's mask, for a model with masks_on_host; None: it makes them itself
    Returns [B,C,H,W], detached.  Raises ValueError if steps < 0 or mask_noise does not hold one entry per step.
    """
    if steps < 0:
        raise ValueError(f"steps: expected 0 or more, got {steps}")
    if mask_noise is None:
        mask_noise = [torch.rand(model.noise_shape(len(images)), device=images.device) for _ in range(steps)]
    if len(mask_noise) != steps:
        raise ValueError(f"mask_noise: expected one [B,L] tensor for each of {steps} steps, got {len(mask_noise)}")
    if start is None:
        # A tensor on the device, as the training step's seed is: a number would have to be copied from the host.
        start = torch.randint(2**63 - 1, (), device=images.device)
    functions = functions or plain_functions(model)
    images = images.detach()
    adv = functions.start(images, bounds, start, model.kernels)
    ascend = _ascend_patches if by_patches(model) else _ascend_images
    for step, noise in enumerate(mask_noise):
        plan = () if plans is None else plans[step : step + 1]
        adv = ascend(model, functions, images, adv, bounds, noise, mask_ratio, loss_scale, *plan)
    return adv


def _ascend_patches(
    model: MaskedAutoencoder,
    functions: MaeAttackFunctions,
    images: Tensor,
    adv: Tensor,
    bounds: Tensor,
    noise: Tensor,
    mask_ratio: float,
    loss_scale: float,
    *plan: Tensor,
) -> Tensor:
    """A step that differentiates the kept patches; noise [B,L] or [1,L] decides which they are."""
    ids_shuffle, ids_restore, keep = model.random_masking(noise, mask_ratio)
    # A family may mask the whole batch alike, with one row.
    ids_restore = ids_restore.expand(len(images), -1)
    # The leaf is [B,K,P]: the encoder's backward pass ends at the patches, and no [B,C,H,W] is filled with zeros.
    patches = model.visible(adv, ids_shuffle[:, :keep]).requires_grad_(True)
    with torch.enable_grad():
        # The target is `adv` too, but as a constant: its share of the gradient is taken from `pred`, below.
        loss, pred = functions.loss(model, patches, ids_shuffle, adv, *plan)
        (grad,) = torch.autograd.grad(loss * loss_scale, patches)
    shape = (model.patch_size, model.norm_pix_loss)
    return functions.step(images, adv, grad, pred, ids_restore, bounds, *shape, impl=model.kernels)


def _ascend_images(
    model: MaskedAutoencoder,
    functions: MaeAttackFunctions,
    images: Tensor,
    adv: Tensor,
    bounds: Tensor,
    noise: Tensor,
    mask_ratio: float,
    loss_scale: float,
    *plan: Tensor,
) -> Tensor:
    """The same step by the gradient of whole images."""
    # A fresh mask for every step, as in the original.
    ids_shuffle, _, keep = model.random_masking(noise, mask_ratio)
    _, grad = gradient(lambda leaf: functions.loss(model, leaf, ids_shuffle, keep, *plan), adv, loss_scale)
    return functions.step(images, adv, grad, bounds)
