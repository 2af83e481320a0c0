"""L-infinity attacks on any loss: PGD, and PGD that keeps its best iterate (Auto-PGD: apgd.py).

Shapes: B batch, C channels, H W sides.

Every decision is taken on the device, so that the host never waits; the number of passes depends on `steps` alone.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from mimir_fast.kernels import linf_bounds, linf_start
from mimir_fast.kernels._shared.bytes import as_floats

__all__ = ["attack_bounds", "linf_step", "pgd", "pgd_best", "starting_point"]


def attack_bounds(
    eps: float,
    alpha: float,
    device: torch.device | str,
    channels: int = 3,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> Tensor:
    """The bounds [4,C] of an attack whose radius eps and step alpha are in 1/255, on pixels in [0,1].

    mean, std   [C] of normalised images (x - mean) / std, whose radius, step and range differ by channel; None: as they are
    """
    if mean is None or std is None:
        return linf_bounds(eps / 255, alpha / 255, 0.0, 1.0, channels, device)
    mean_C, std_C = torch.tensor(mean), torch.tensor(std)
    lo_C, hi_C = (0.0 - mean_C) / std_C, (1.0 - mean_C) / std_C
    return linf_bounds(eps / 255 / std_C, alpha / 255 / std_C, lo_C, hi_C, channels, device)


def starting_point(images: Tensor, bounds: Tensor, start: Tensor, kernels: str = "auto") -> Tensor:
    """Where the attack starts, [B,C,H,W] within the valid range.

    images may be uint8, 255 for 1.
    start: a seed (one int64 number) of uniform noise in the ball, or the additive noise itself [B,C,H,W].
    """
    if not start.is_floating_point():
        return linf_start(images, bounds, start, impl=kernels)
    images = as_floats(images)
    lo, hi = bounds[2:, :, None, None].to(images.dtype)
    return torch.clamp(images + start, lo, hi)


def project(images: Tensor, adv: Tensor, bounds: Tensor) -> Tensor:
    """Project adv onto the points within eps of the images and in [lo, hi]; all [B,C,H,W], bounds [4,C]."""
    eps, _, lo, hi = bounds.to(adv.dtype)[:, :, None, None]
    # The ball first, then the range: clean images lie in the range, so that the second clamp cannot leave the ball.
    return torch.clamp(images + torch.clamp(adv - images, -eps, eps), lo, hi)


def linf_step(images: Tensor, adv: Tensor, grad: Tensor, bounds: Tensor) -> Tensor:
    """PGD step: adv + alpha * sign(grad), projected; a pixel whose gradient is 0 stays."""
    alpha = bounds.to(adv.dtype)[1, :, None, None]
    return project(images, adv + alpha * grad.sign(), bounds)


def pgd(
    loss: Callable[[Tensor], Tensor],
    images: Tensor,
    bounds: Tensor,
    steps: int,
    start: Tensor | None = None,
    *,
    loss_scale: float = 1.0,
    step: Callable[..., Tensor] = linf_step,
    begin: Callable[..., Tensor] = starting_point,
) -> Tensor:
    """Projected gradient ascent.

    loss         adv [B,C,H,W] -> scalar to ascend.  Its model should have no trainable parameters (pgd_mae.frozen_twin): a
                 compiled loss would compute their gradients as well, unused
    bounds       [4,C] eps, alpha, lo, hi of every channel in the images' units (mimir_fast.kernels.linf_bounds)
    start        None: the images; a seed (one int64 number) of uniform noise in the ball; or the noise itself [B,C,H,W]
    loss_scale   multiplies the loss before its backward pass, since fp16 gradients underflow; their signs stay as they are
    step, begin  functions for the step and the start, as they are or compiled
    Returns [B,C,H,W], detached, within eps of the images and in [lo, hi].
    Raises ValueError if steps < 0.  Source: Madry et al., Towards Deep Learning Models Resistant to Adversarial Attacks, 2018.
    """
    check_steps(steps)
    images = images.detach()
    adv = images if start is None else begin(images, bounds, start)
    for _ in range(steps):
        _, grad = gradient(loss, adv, loss_scale)
        adv = step(images, adv, grad, bounds)
    return adv


def pgd_best(
    losses: Callable[[Tensor], Tensor],
    images: Tensor,
    bounds: Tensor,
    steps: int,
    start: Tensor | None = None,
    *,
    shared: bool = False,
    loss_scale: float = 1.0,
    step: Callable[..., Tensor] = linf_step,
    begin: Callable[..., Tensor] = starting_point,
) -> Tensor:
    """`pgd` that returns, of the start and all iterates, for each image the one with the highest loss, the earliest of equals.

    losses   adv [B,C,H,W] -> the images' losses [B]; called steps + 1 times, the last time without a backward pass
    shared   the whole batch gets one iterate, that of the highest mean loss, as in ARES with mixed targets
    All other arguments, the result and errors are those of `pgd`.
    """
    best: tuple[Tensor, Tensor] | None = None

    def watched(adv: Tensor) -> Tensor:
        nonlocal best
        loss_B = losses(adv)
        now, point = loss_B.detach(), adv.detach()
        now = now.mean().expand_as(now) if shared else now
        if best is None:
            # A copy: functions compiled with CUDA graphs write their next outputs into the same memory.
            best = point, now.clone()
        else:
            higher = now > best[1]
            best = choose(higher, point, best[0]), torch.where(higher, now, best[1])
        return loss_B

    last = pgd(watched, images, bounds, steps, start, loss_scale=loss_scale, step=step, begin=begin)
    with torch.no_grad():
        watched(last)
    assert best is not None
    return best[0]


def gradient(loss: Callable[[Tensor], Tensor], adv: Tensor, loss_scale: float) -> tuple[Tensor, Tensor]:
    """The loss at adv, detached, and loss_scale * the gradient of its sum in adv."""
    leaf = adv.detach().requires_grad_(True)
    with torch.enable_grad():
        value = loss(leaf)
        # The sum and not the mean: an image's gradient does not depend on how many others there are.
        (grad,) = torch.autograd.grad(value.sum() * loss_scale, leaf)
    return value.detach(), grad


def check_steps(steps: int) -> None:
    """Raises ValueError for a negative number of steps."""
    if steps < 0:
        raise ValueError(f"steps: expected 0 or more, got {steps}")


def choose(which_B: Tensor, yes: Tensor, no: Tensor) -> Tensor:
    """`yes` for the images of which_B, `no` for the others; both [B,C,H,W]."""
    return torch.where(which_B[:, None, None, None], yes, no)
