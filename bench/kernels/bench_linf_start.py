"""linf_start: images in random places of the ball.  Recipes store images in fp32.

torch noise, the rival from elsewhere, draws other numbers: it is held to the ball and to its noise's moments.
"""

import torch
from torch import Tensor

from bench.kernels.suite import Size
from mimir_fast.kernels import linf_bounds, linf_start
from tests.support.cases import DTYPES, Case

EPS = 8 / 255
ALL = 2**63 - 1  # seeds


def torch_noise(images_BCHW: Tensor, bounds_4C: Tensor, seed: Tensor) -> Tensor:
    """Uniform noise from torch's generator, which has no seed on the device; a tensor of noise is stored."""
    eps, _, lo, hi = bounds_4C.to(images_BCHW.dtype)[:, :, None, None]
    return torch.clamp(images_BCHW + eps * torch.empty_like(images_BCHW).uniform_(-1, 1), lo, hi)


def moments(value: Tensor, images: Tensor) -> str:
    """Whether value - images looks like uniform noise in the ball, where the range [0, 1] does not cut it."""
    noise = (value.double() - images.double())[(images > EPS) & (images < 1 - EPS)]
    rounding = torch.finfo(value.dtype).eps
    if not noise.abs().max() <= EPS + 2 * rounding:
        return f"off by {noise.abs().max().item():.3g}, the ball has {EPS:.3g}"
    mean, deviation = noise.mean().item(), noise.std().item()
    slack = 5 * EPS / len(noise) ** 0.5 + rounding
    if abs(mean) > slack or abs(deviation - EPS / 3**0.5) > slack:
        return f"noise has mean {mean:.3g} and deviation {deviation:.3g}, expected 0 and {EPS / 3**0.5:.3g}"
    return ""


def cases(size: Size, dtype: str) -> list[Case]:
    def draw(device: torch.device) -> dict:
        return {
            "images_BCHW": torch.rand(size.B, 3, size.side, size.side, device=device).to(DTYPES[dtype]),
            "bounds_4C": linf_bounds(EPS, 10 / 255, 0.0, 1.0, 3, device),
            "seed": torch.randint(ALL, (), device=device),
        }

    shape = {"B": size.B, "side": size.side}
    rivals = {"torch noise": torch_noise}
    own = {"torch noise": lambda value, inputs: moments(value, inputs["images_BCHW"])}
    return [Case("linf_start", shape, dtype, draw, linf_start, rivals, usual="fp32", own_judges=own)]
