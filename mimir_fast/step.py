"""THE pre-training step, in the order in which the data flows.

Shapes: B batch, C channels, H W sides, L patches, K kept patches, P numbers per patch, D width.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from mimir_fast.attack import Bound, pgd_mae, reconstruction_loss
from mimir_fast.mi import penalty_value


class Noise(NamedTuple):
    """Every random draw of a step: additive start noise [B,C,H,W], one [B,L] per attack step, one [B,L] for training."""

    start: Tensor
    attack_masks: list[Tensor]
    train_mask: Tensor


class Attack(NamedTuple):
    """PGD-MAE in the units of the images; steps None: no attack, a plain masked autoencoder."""

    steps: int | None = None
    eps: Bound = 0.0
    alpha: Bound = 0.0
    lo: Bound = 0.0
    hi: Bound = 1.0
    mask_ratio: float = 0.75
    loss_scale: float = 1.0


class StepOutput(NamedTuple):
    """Device values only: loss = recon + weight * penalty (scalars, mi unweighted), penalty_used (bool), images, patches."""

    loss: Tensor
    recon: Tensor
    mi: Tensor
    penalty_used: Tensor
    adv: Tensor
    pred: Tensor
    mask: Tensor


def draw_noise(generator: torch.Generator, shape: torch.Size, num_patches: int, attack: Attack) -> Noise:
    """Draw a step's randomness for images of `shape` [B,C,H,W] on the generator's device: start, attack masks, mask."""

    def uniform(*size: int) -> Tensor:
        return torch.rand(*size, device=generator.device, generator=generator)

    start = attack.eps * (2 * uniform(*shape) - 1) if attack.steps is not None else uniform(0)
    masks = [uniform(shape[0], num_patches) for _ in range(attack.steps or 0)]
    return Noise(start, masks, uniform(shape[0], num_patches))


def step_seed(seed: int, rank: int, epoch: int, step: int) -> int:
    """Seed of one micro-step's noise: a function of its position, so that any step can be replayed and a run resumed."""
    return int(np.random.SeedSequence([seed, rank, epoch, step]).generate_state(1, np.uint64)[0] >> 1)


def pretrain_step(
    forward: nn.Module,
    images: Tensor,
    noise: Noise,
    attack: Attack,
    mask_ratio: float,
    penalty: str | None = None,
    penalty_weight: float = 0.0,
    bare_model: nn.Module | None = None,
    attack_loss: Callable[..., Tensor] = reconstruction_loss,
) -> StepOutput:
    """Attack, encode, decode, loss and penalty of one micro-batch; the caller runs the backward pass.

    forward     the model, possibly wrapped (DDP, torch.compile); bare_model: the module the attack runs on
    images      [B,C,H,W] float, clean; the loss reconstructs them from their adversarial version
    penalty     hsic, dib_mi, renyi2 or None; only with an attack, as in the original
    """
    adv = images
    if attack.steps is not None:
        adv = pgd_mae(
            bare_model if bare_model is not None else forward,
            images,
            eps=attack.eps,
            alpha=attack.alpha,
            steps=attack.steps,
            lo=attack.lo,
            hi=attack.hi,
            mask_ratio=attack.mask_ratio,
            start_noise=noise.start,
            mask_noise=noise.attack_masks,
            loss_scale=attack.loss_scale,
            loss_fn=attack_loss,
        )
    recon, pred, mask, latent = forward(images, mask_ratio, adv, noise.train_mask)
    if penalty is None or attack.steps is None:
        return StepOutput(
            recon, recon.detach(), recon.new_zeros(()), recon.new_ones((), dtype=torch.bool), adv, pred.detach(), mask
        )
    mi, used, term = guarded_penalty(penalty, latent, images, adv)
    return StepOutput(recon + penalty_weight * term, recon.detach(), mi, used, adv, pred.detach(), mask)


def guarded_penalty(penalty: str, latent: Tensor, images: Tensor, adv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The penalty's value, whether it is usable, and a term with that value and gradient (zero and none if unusable).

    Usable: finite, not exactly zero, gradient finite.  Decided on the device: a NaN never meets the reconstruction's gradient.
    """
    with torch.enable_grad():
        leaf = latent.detach().requires_grad_(True)
        value = penalty_value(penalty, leaf, images, adv)
        (grad,) = torch.autograd.grad(value, leaf)
    value = value.detach()
    used = value.isfinite() & (value != 0) & grad.isfinite().all()
    grad = torch.where(used, grad, 0)
    term = torch.where(used, value, 0) + InjectGradient.apply(latent, grad)
    return value, used, term


class InjectGradient(torch.autograd.Function):
    """Zero in the forward pass, a given gradient for the tensor [any shape] in the backward pass."""

    @staticmethod
    def forward(ctx, tensor: Tensor, grad: Tensor) -> Tensor:
        ctx.save_for_backward(grad)
        return torch.zeros((), dtype=torch.float32, device=tensor.device)

    @staticmethod
    def backward(ctx, grad_zero: Tensor):
        (grad,) = ctx.saved_tensors
        return grad_zero * grad, None
