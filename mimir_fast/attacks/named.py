"""Named attacks of an evaluation, and the gradient attacks among them.  Shapes: B batch, C channels, H W sides, O classes.

All in fp32 on pixels in [0,1]; models that expect normalised images normalise inside.  What happens to an image does not
depend on the rest of its batch: losses are summed, and its random start is a function of the seed and of its index in the
data set.
"""

import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mimir_fast.attacks.l2 import l2_start, l2_step
from mimir_fast.attacks.linf import pgd
from mimir_fast.kernels import linf_bounds
from mimir_fast.kernels.linf_start.reference import philox

KINDS = ("clean", "fgsm", "pgd", "cw", "aa", "pgd-mi", "pgd-feature", "pgd-l2", "aa-l2")
DEFAULT_STEPS = {"pgd": 20, "cw": 100, "pgd-mi": 100, "pgd-feature": 100, "pgd-l2": 20}
# Attacks that stand behind one word: what RobustBench evaluates.
SEVERAL = {"robustbench": ("clean", "aa"), "robustbench-l2": ("clean", "aa-l2")}
WORDS = (
    "clean, fgsm, pgd-N (N steps), cw, aa, pgd-mi, pgd-feature, pgd-l2-N, aa-l2, robustbench, robustbench-l2; cw-N, pgd-mi-N, "
    "pgd-feature-N: other than 100 steps"
)
# Radius of the L2 ball where none is named: RobustBench's on CIFAR-10.
USUAL_EPS_L2 = 0.5
# Just under 2^-31, so that the largest 31-bit word maps below 1.
UNIT = 4.6566127342e-10

Loss = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Attack:
    """An attack and its settings; eps and alpha in 1/255, for attacks in the L2 norm the norm of the perturbation in [0,1].

    kind      one of KINDS: clean (nothing), fgsm (one step of eps from the image itself), pgd (cross-entropy), cw (PGD on
              the margin between the best wrong logit and the right one), aa (AutoAttack standard), pgd-mi and pgd-feature
              (adaptive attacks, see adaptive.py), pgd-l2 and aa-l2 (PGD and AutoAttack in the L2 norm)
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
        """The word for it on the command line."""
        return f"{self.kind}-{self.steps}" if self.kind in DEFAULT_STEPS else self.kind

    @property
    def in_l2(self) -> bool:
        """Whether its ball is that of the L2 norm, and not of the L-infinity norm."""
        return self.kind.endswith("-l2")

    @property
    def is_ensemble(self) -> bool:
        """Whether it is AutoAttack, in either norm."""
        return self.kind in ("aa", "aa-l2")

    @property
    def radius(self) -> float:
        """Radius of its ball, of pixels in [0,1]."""
        return self.eps if self.in_l2 else self.eps / 255

    @property
    def stride(self) -> float:
        """Size of its steps, of pixels in [0,1]."""
        return self.alpha if self.in_l2 else self.alpha / 255

    @property
    def batch_dependent(self) -> bool:
        """Whether an image's attack depends on the other images of its batch: nHSIC is a property of a batch."""
        return self.kind == "pgd-mi"

    def settings(self) -> dict:
        """The settings that decide the result."""
        used: dict[str, tuple[str, ...]] = {
            "clean": (),
            "fgsm": ("eps",),
            "aa": ("eps",),
            "aa-l2": ("eps",),
            "pgd-mi": ("steps", "eps", "alpha", "restarts", "weight"),
        }
        names = used.get(self.kind, ("steps", "eps", "alpha", "restarts"))
        return {"attack": self.name, **{name: value for name, value in asdict(self).items() if name in names}}


def parse_attacks(
    words: str,
    eps: float,
    alpha: float,
    restarts: int = 1,
    weight: float = 1e-5,
    eps_l2: float = USUAL_EPS_L2,
    alpha_l2: float | None = None,
) -> tuple[Attack, ...]:
    """Attacks from their names, such as "clean,pgd-20,aa", all with radius eps and step alpha (1/255).

    eps_l2, alpha_l2   radius and step of those in the L2 norm, of pixels in [0,1]; without a step a quarter of the radius
    Raises ValueError for an unknown name.
    """
    named = (word.strip() for word in words.split(","))
    attacks = [make_attack(name, eps, alpha, restarts, weight) for word in named for name in SEVERAL.get(word, (word,))]
    stride = eps_l2 / 4 if alpha_l2 is None else alpha_l2
    return tuple(
        replace(attack, eps=eps_l2, alpha=stride if attack.steps else 0.0) if attack.in_l2 else attack
        for attack in attacks
    )


def make_attack(name: str, eps: float, alpha: float, restarts: int = 1, weight: float = 1e-5) -> Attack:
    """An attack by its name (see WORDS).  Raises ValueError for an unknown name."""
    # The kind is matched lazily, so that a number at the end is taken for the steps: "pgd-mi-50" is pgd-mi with 50 steps.
    match = re.fullmatch(r"(.+?)(?:-(\d+))?", name)
    kind, number = (match[1], match[2]) if match else (name, None)
    if kind not in KINDS or (number is not None and (kind not in DEFAULT_STEPS or int(number) < 1)):
        raise ValueError(f"attacks: {name!r} is no attack; expected {WORDS}")
    if kind == "clean":
        return Attack(kind)
    if kind in ("fgsm", "aa", "aa-l2"):
        return Attack(kind, eps=eps)
    steps = DEFAULT_STEPS[kind] if number is None else int(number)
    return Attack(kind, steps, eps, alpha, restarts, weight if kind == "pgd-mi" else 0.0)


def fgsm(model: nn.Module, images: Tensor, labels: Tensor, eps: float) -> Tensor:
    """Fast gradient sign method: one step of eps (1/255) from the images themselves -> [B,C,H,W].

    Source: Goodfellow et al., Explaining and Harnessing Adversarial Examples, 2015.
    """
    bounds = _bounds(eps / 255, eps / 255, images.device, images.shape[1])
    return pgd(cross_entropy(model, labels), images, bounds, steps=1)


def gradient_attack(loss: Loss, images: Tensor, indices: Tensor, attack: Attack, seed: int, restart: int) -> Tensor:
    """PGD on a loss that is a sum over images, from each image's own random start -> [B,C,H,W], the last iterate.

    indices   int64 [B], the images' indices in the data set
    """
    bounds, indices = _bounds(attack.radius, attack.stride, images.device, images.shape[1]), indices.to(images.device)
    if attack.in_l2:
        uniform = start_noise(indices, torch.Size([images[0].numel() + 1]), seed, restart)
        return pgd(loss, images, bounds, attack.steps, uniform, step=l2_step, begin=l2_start)
    noise = start_noise(indices, images.shape[1:], seed, restart) * attack.radius
    return pgd(loss, images, bounds, attack.steps, noise)


def cross_entropy(model: nn.Module, labels: Tensor) -> Loss:
    """Cross-entropy summed over the images."""
    return lambda adv: F.cross_entropy(model(adv), labels, reduction="sum")


def margin(logits: Tensor, labels: Tensor) -> Tensor:
    """Margin [B]: the largest logit of a wrong class minus that of the right one; positive where misclassified."""
    wrong = logits.scatter(1, labels[:, None], -torch.inf).amax(dim=1)
    return wrong - logits.gather(1, labels[:, None])[:, 0]


def margin_loss(model: nn.Module, labels: Tensor) -> Loss:
    """Carlini and Wagner's loss: the margin summed over the images, not clipped.

    Source: Carlini and Wagner, Towards Evaluating the Robustness of Neural Networks, 2017, function f6; with PGD under the
    L-infinity bound: Madry et al., Towards Deep Learning Models Resistant to Adversarial Attacks, 2018.
    """
    # Clipped at 0 a misclassified image would have no gradient and come back: the last iterate is what counts.
    return lambda adv: margin(model(adv), labels).sum()


def start_noise(indices: Tensor, shape: torch.Size, seed: int, restart: int = 0) -> Tensor:
    """Uniform noise in [-1,1) [B,*shape], a function of seed, restart and each image's index in the data set.

    Source: Philox-4x32-10, Salmon et al., 2011: word j % 4 of block index * blocks + j // 4, keyed by seed and restart.
    """
    count = shape.numel()
    blocks = (count + 3) // 4
    # The attack is not part of the key: all attacks start from the same noise, so that they can be compared image by image.
    key = _key(seed, restart, indices.device)
    block = indices[:, None] * blocks + torch.arange(blocks, device=indices.device)
    words = torch.stack(philox(key, block.flatten()), dim=1).view(len(indices), -1)[:, :count]
    return ((words >> 1).float() * UNIT * 2 - 1).view(len(indices), *shape)


# Cached: each copy from the host makes it wait for a GPU, and a CUDA graph may not hold one.
@lru_cache(maxsize=64)
def _bounds(radius: float, stride: float, device: torch.device, channels: int) -> Tensor:
    return linf_bounds(radius, stride, 0.0, 1.0, channels, device)


@lru_cache(maxsize=64)
def _key(seed: int, restart: int, device: torch.device) -> Tensor:
    """The key of the noise, a scalar int64."""
    # 31 bits for the restart, since an int64 has a sign.
    return torch.tensor((seed % 2**32) | (restart % 2**31) << 32, device=device)
