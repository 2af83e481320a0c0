"""Attacks by name, and the gradient attacks among them.  Shapes: B batch, C channels, H W sides, O classes.

Everything is in fp32 on pixels in [0,1]; a model that wants normalised images normalises inside.  What happens to an image
depends on the image alone: losses are summed over the batch, and its random start is a function of the seed and of its
number in the data set.
"""

import re
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mimir_fast.attacks.linf import pgd
from mimir_fast.kernels import linf_bounds
from mimir_fast.kernels.linf_start.reference import philox

KINDS = ("clean", "fgsm", "pgd", "cw", "aa", "pgd-mi", "pgd-feature")
DEFAULT_STEPS = {"pgd": 20, "cw": 100, "pgd-mi": 100, "pgd-feature": 100}
WORDS = "clean, fgsm, pgd-N (N steps), cw, aa, pgd-mi, pgd-feature; cw-N, pgd-mi-N, pgd-feature-N: other than 100 steps"
UNIT = 4.6566127342e-10  # just under 2^-31

Loss = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Attack:
    """What is done to the images.  eps and alpha in 1/255.

    kind      one of KINDS: clean (nothing), fgsm (one step of eps from the image itself), pgd (cross-entropy), cw (PGD on
              the margin between the best wrong logit and the right one), aa (AutoAttack standard), pgd-mi and pgd-feature
              (adaptive attacks, see adaptive.py)
    restarts  random starts; an image is robust if none of them breaks it
    weight    of the penalty in pgd-mi
    """

    kind: str
    steps: int = 0
    eps: float = 0.0
    alpha: float = 0.0
    restarts: int = 1
    weight: float = 0.0

    @property
    def name(self) -> str:
        """As it is asked for on the command line."""
        return f"{self.kind}-{self.steps}" if self.kind in DEFAULT_STEPS else self.kind

    @property
    def batch_dependent(self) -> bool:
        """Whether the other images of its batch matter to an image: nHSIC is a property of a batch."""
        return self.kind == "pgd-mi"

    def settings(self) -> dict:
        """What matters to the result."""
        used = {
            "clean": (),
            "fgsm": ("eps",),
            "aa": ("eps",),
            "pgd-mi": ("steps", "eps", "alpha", "restarts", "weight"),
        }
        names = used.get(self.kind, ("steps", "eps", "alpha", "restarts"))
        return {"attack": self.name, **{name: value for name, value in asdict(self).items() if name in names}}


def parse_attacks(words: str, eps: float, alpha: float, restarts: int = 1, weight: float = 1e-5) -> tuple[Attack, ...]:
    """ "clean,pgd-20,aa" -> attacks of that radius eps and step alpha (1/255).  Raises ValueError for an unknown name."""
    return tuple(make_attack(word.strip(), eps, alpha, restarts, weight) for word in words.split(","))


def make_attack(name: str, eps: float, alpha: float, restarts: int = 1, weight: float = 1e-5) -> Attack:
    """One attack by name, see WORDS.  Raises ValueError for an unknown name."""
    match = re.fullmatch(r"(.+?)(?:-(\d+))?", name)
    kind, steps = (match[1], match[2]) if match else (name, None)
    if kind not in KINDS or (steps is not None and (kind not in DEFAULT_STEPS or int(steps) < 1)):
        raise ValueError(f"attacks: {name!r} is no attack; expected {WORDS}")
    if kind == "clean":
        return Attack(kind)
    if kind in ("fgsm", "aa"):
        return Attack(kind, eps=eps)
    steps = DEFAULT_STEPS[kind] if steps is None else int(steps)
    return Attack(kind, steps, eps, alpha, restarts, weight if kind == "pgd-mi" else 0.0)


def fgsm(model: nn.Module, images: Tensor, labels: Tensor, eps: float) -> Tensor:
    """One step of eps (1/255) along the sign of the cross-entropy's gradient at the images themselves -> [B,C,H,W].

    Source: Goodfellow et al., Explaining and Harnessing Adversarial Examples, 2015.
    """
    return pgd(cross_entropy(model, labels), images, pixel_bounds(images, eps, eps), steps=1)


def gradient_attack(loss: Loss, images: Tensor, numbers: Tensor, attack: Attack, seed: int, restart: int) -> Tensor:
    """PGD on a loss that is a sum over images, from each image's own random start -> [B,C,H,W], the last iterate.

    numbers: int64 [B], the images' numbers in the data set.
    """
    bounds = pixel_bounds(images, attack.eps, attack.alpha)
    noise = start_noise(numbers.to(images.device), images.shape[1:], seed, restart) * (attack.eps / 255)
    return pgd(loss, images, bounds, attack.steps, noise)


def cross_entropy(model: nn.Module, labels: Tensor) -> Loss:
    """Cross-entropy summed over the images."""
    return lambda adv: F.cross_entropy(model(adv), labels, reduction="sum")


def margin(logits: Tensor, labels: Tensor) -> Tensor:
    """Best wrong logit minus the right one, [B]; positive: misclassified."""
    right = F.one_hot(labels, logits.shape[1]).bool()
    return logits.masked_fill(right, -torch.inf).amax(dim=1) - logits[right]


def margin_loss(model: nn.Module, labels: Tensor) -> Loss:
    """The margin summed over the images.  Source: Carlini and Wagner, Towards Evaluating the Robustness of Neural
    Networks, 2017, function f6, which PGD ascends under the L-infinity bound (Madry et al., 2018); unclipped."""
    return lambda adv: margin(model(adv), labels).sum()


def pixel_bounds(images: Tensor, eps: float, alpha: float) -> Tensor:
    """[4,C] of radius eps and step alpha in 1/255, pixels in [0,1]."""
    return linf_bounds(eps / 255, alpha / 255, 0.0, 1.0, images.shape[1], images.device)


def start_noise(numbers: Tensor, shape: torch.Size, seed: int, restart: int = 0) -> Tensor:
    """Uniform noise in [-1,1) for images of a shape, [B,*shape]: a function of seed, restart and each image's number alone.

    All attacks start from the same noise, so that they differ by what they do and not by luck.
    Source: Philox-4x32-10, Salmon et al., 2011: word j % 4 of block number * blocks + j // 4, keyed by seed and restart.
    """
    count = shape.numel()
    blocks = (count + 3) // 4
    key = torch.tensor((seed % 2**32) | (restart % 2**31) << 32, device=numbers.device)
    block = numbers[:, None] * blocks + torch.arange(blocks, device=numbers.device)
    words = torch.stack(philox(key, block.flatten()), dim=1).view(len(numbers), -1)[:, :count]
    return ((words >> 1).float() * UNIT * 2 - 1).view(len(numbers), *shape)
