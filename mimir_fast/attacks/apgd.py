"""Auto-PGD (APGD), L-infinity, on any loss.  Shapes: B batch, C channels, H W sides.  No decision waits for the host."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from mimir_fast.attacks.linf import check_steps, choose, gradient, linf_step, project, starting_point

__all__ = ["apgd", "checkpoints", "momentum_step"]

# Weight of the new direction; the rest is that of the last move.
MOMENTUM = 0.75
# Fraction of steps that must raise the loss, or the step is halved.
RISES = 0.75


def momentum_step(images: Tensor, adv: Tensor, last: Tensor, grad: Tensor, size_B: Tensor, bounds: Tensor) -> Tensor:
    """APGD step: a sign step of size_B * eps, mixed with the move from `last` to adv; both results are projected."""
    size = bounds.to(adv.dtype)[0, :, None, None] * size_B[:, None, None, None]
    # As in algorithm 1 of the paper: the mix of the two moves can leave the ball, although both ends of each lie in it.
    target = project(images, adv + size * grad.sign(), bounds)
    return project(images, adv + MOMENTUM * (target - adv) + (1 - MOMENTUM) * (adv - last), bounds)


def apgd(
    losses: Callable[[Tensor], Tensor],
    images: Tensor,
    bounds: Tensor,
    steps: int,
    start: Tensor | None = None,
    *,
    loss_scale: float = 1.0,
    step: Callable[..., Tensor] = linf_step,
    move: Callable[..., Tensor] = momentum_step,
    begin: Callable[..., Tensor] = starting_point,
) -> Tensor:
    """Auto-PGD: momentum, a step of 2 eps that is halved for each image whose loss stops rising, the best iterate returned.

    losses       adv [B,C,H,W] -> the images' losses [B]; called steps + 1 times, the last time without a backward pass
    bounds, start, loss_scale, begin: as in `pgd`; alpha is not used
    step, move   functions for the first step and for the others, as they are or compiled
    Returns [B,C,H,W], detached: of the start and all iterates, for each image the one with the highest loss.
    Raises ValueError if steps < 0.  Source: Croce and Hein, arXiv 2003.01690, algorithm 1, with checkpoints rounded down and
    the first step counted as a rise, as its authors run it.
    """
    check_steps(steps)
    images = images.detach()
    adv = images if start is None else begin(images, bounds, start)
    if not steps:
        return adv
    value, grad = gradient(losses, adv, loss_scale)
    search = _Search.begun(adv, grad, value)
    size_B, checks = torch.full_like(value, 2.0), checkpoints(steps)
    # There is no last move yet: a plain step with alpha = 2 eps.
    last, adv = adv, step(images, adv, grad, torch.cat([bounds[:1], 2 * bounds[:1], bounds[2:]]))
    for i in range(1, steps):
        value, grad = gradient(losses, adv, loss_scale)
        search = search.seen(adv, grad, value, counts=i > 1)
        # With 2 steps nothing is ever halved: the only checkpoint that a step follows comes after the first step, a rise.
        if i in checks:
            search, halved = search.judged(checks[i])
            size_B = torch.where(halved, size_B / 2, size_B)
            adv, grad = choose(halved, search.best, adv), choose(halved, search.best_grad, grad)
        last, adv = adv, move(images, adv, last, grad, size_B, bounds)
    with torch.no_grad():
        return choose(losses(adv) > search.best_value, adv, search.best)


class _Search(NamedTuple):
    """State of APGD.

    best, best_grad, best_value   best iterate [B,C,H,W], its gradient and its loss [B]
    value                         loss of the last iterate [B]
    checked                       best loss at the last checkpoint [B]
    rises                         iterates since then that had a higher loss than the one before [B]
    halved                        whether the step was halved at the last checkpoint [B]; true at the start
    """

    best: Tensor
    best_grad: Tensor
    best_value: Tensor
    value: Tensor
    checked: Tensor
    rises: Tensor
    halved: Tensor

    @classmethod
    def begun(cls, adv: Tensor, grad: Tensor, value: Tensor) -> "_Search":
        """The state at the start."""
        # Copies: functions compiled with CUDA graphs write their next outputs into the same memory.
        value, grad = value.clone(), grad.clone()
        return cls(adv, grad, value, value, value, torch.ones_like(value), torch.ones_like(value, dtype=torch.bool))

    def seen(self, adv: Tensor, grad: Tensor, value: Tensor, counts: bool) -> "_Search":
        """The state after an iterate with its gradient and loss; counts: False for the first, which is a rise in any case."""
        better = value > self.best_value
        return self._replace(
            best=choose(better, adv, self.best),
            best_grad=choose(better, grad, self.best_grad),
            best_value=torch.where(better, value, self.best_value),
            value=value.clone(),
            rises=self.rises + (value > self.value) if counts else self.rises,
        )

    def judged(self, window: int) -> tuple["_Search", Tensor]:
        """The state after a checkpoint, `window` steps after the one before, and which images [B] halve their step and go
        back to the best iterate."""
        # The paper's two conditions: too few rises; neither step nor best loss changed since the last checkpoint.
        stuck = ~self.halved & (self.best_value <= self.checked)
        halved = (self.rises <= RISES * window) | stuck
        return self._replace(checked=self.best_value, rises=torch.zeros_like(self.rises), halved=halved), halved


def checkpoints(steps: int) -> dict[int, int]:
    """Iterations after which the step may be halved -> their distance from the one before.

    The first comes after 22 % of the steps; distances shrink by 3 % of the steps each time, down to 6 %.
    """
    at, window = 0, max(int(0.22 * steps), 1)
    found = {}
    while at + window <= steps:
        at += window
        found[at] = window
        # The paper's p_(j+1) = p_j + max(p_j - p_(j-1) - 0.03, 0.06), in whole steps.
        window = max(window - max(int(0.03 * steps), 1), max(int(0.06 * steps), 1))
    return found
