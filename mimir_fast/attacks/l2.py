"""L2 attacks: the step, the projection and the random start that `linf.pgd` takes.  Shapes: B batch, C channels, H W sides.

Radius and step are Euclidean norms of the whole perturbation of an image in [0,1].  As everywhere, the host never waits.
"""

import torch
from torch import Tensor

# Below it a gradient counts as zero: its image stays.
TINY = 1e-12
# erfinv(-1) is infinite; the uniform numbers begin at -1.
LARGEST = 1 - 2.0**-24


def norms(images: Tensor) -> Tensor:
    """Euclidean norm of each image [B,C,H,W] -> [B,1,1,1]."""
    return torch.linalg.vector_norm(images, dim=(1, 2, 3), keepdim=True)


def project(images: Tensor, adv: Tensor, bounds: Tensor) -> Tensor:
    """Project adv onto the points within eps of the images and in [lo, hi]; all [B,C,H,W], bounds [4,C] with one eps."""
    eps, (lo, hi) = bounds[0, 0], bounds[2:, :, None, None]
    move = adv - images
    # The ball first, then the range: images lie in the range, so that clamping brings no pixel farther from them.
    return torch.clamp(images + move * (eps / norms(move).clamp_min(TINY)).clamp_max(1), lo, hi)


def l2_step(images: Tensor, adv: Tensor, grad: Tensor, bounds: Tensor) -> Tensor:
    """PGD step: adv + alpha * grad / |grad|, projected; an image whose gradient is 0 stays."""
    return project(images, adv + bounds[1, 0] * grad / norms(grad).clamp_min(TINY), bounds)


def l2_start(images: Tensor, bounds: Tensor, uniform: Tensor) -> Tensor:
    """A start in the ball, cut to [lo, hi], from uniform numbers in [-1,1) [B,C*H*W+1], the last of which decides the distance.

    Uniform in the ball: a normal direction, at a distance of eps * u^(1/n) for n pixels.
    """
    # erfinv makes them normal but for a factor of sqrt(2), which is gone once the direction has length 1.
    direction = torch.erfinv(uniform[:, :-1].clamp(-LARGEST, LARGEST)).view_as(images)
    share = ((uniform[:, -1] + 1) / 2) ** (1 / direction[0].numel())
    move = direction / norms(direction).clamp_min(TINY) * (bounds[0, 0] * share)[:, None, None, None]
    return project(images, images + move, bounds)
