"""AutoAttack standard (L-infinity, L2), attack by attack, by the package pyautoattack.  Shapes: B batch, C channels, H W sides.

The ensemble is APGD on cross-entropy, targeted APGD on the DLR loss (9 targets), targeted FAB (9 targets) and Square (5000
queries); each attacks the images that are still robust after those before it.  The package draws random numbers for a whole
group of images, so that they depend on the group: its size is a setting of its own (--aa_batch), and inside the model a group
is split into batches of --batch_size.
Source: Croce and Hein, Reliable Evaluation of Adversarial Robustness, arXiv 2003.01690.
"""

import hashlib
import logging

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

SUB_ATTACKS = ("apgd-ce", "apgd-t", "fab-t", "square")
# Passes per image that no attack breaks, forward and backward counted alike, for the estimate of the time left.
PASSES = {"apgd-ce": 200, "apgd-t": 1800, "fab-t": 2700, "square": 5000}
TARGETS = 9
# The targeted DLR loss divides by a difference to the fourth-largest logit.
FEWEST_CLASSES = 4


class InParts(nn.Module):
    """A wrapper that passes images [B,C,H,W] through a model at most `size` at a time.

    Under autograd activations are checkpointed, so that they take the memory of one part.
    """

    def __init__(self, model: nn.Module, size: int):
        super().__init__()
        self.model, self.size = model, size

    def forward(self, images: Tensor) -> Tensor:
        if len(images) <= self.size:
            return self.model(images)
        parts = images.split(self.size)
        # Square and the final predictions need no gradient, hence no second forward pass.
        if not (torch.is_grad_enabled() and images.requires_grad):
            return torch.cat([self.model(part) for part in parts])
        # The reentrant kind refuses torch.autograd.grad, by which the attacks take their gradients.
        return torch.cat([checkpoint(self.model, part, use_reentrant=False) for part in parts])


class AutoAttack:
    """The four attacks at radius eps on a model of pixels in [0,1] without trainable parameters.

    eps          in 1/255 for norm Linf; for norm L2 the norm of the perturbation in [0,1]
    batch_size   images in the model at a time
    Raises ValueError if the package is absent or the model has too few classes.
    """

    def __init__(
        self,
        model: nn.Module,
        num_classes: int,
        eps: float,
        seed: int,
        device: torch.device,
        batch_size: int,
        norm: str = "Linf",
    ):
        if reason := refusal(num_classes):
            raise ValueError(f"attacks: aa {reason}")
        self.seed, self.device = seed, device
        radius = eps / 255 if norm == "Linf" else eps
        # The seed is a stand-in, which `run` replaces before every use; None would mean the clock.
        self.attacks = _package().AutoAttack(
            InParts(model, batch_size), norm=norm, eps=radius, version="standard", seed=0, device=device
        )
        # The package sets these in run_standard_evaluation, which attacks all in turn and is not called here.
        self.attacks.fab.targeted, self.attacks.apgd.loss = True, "ce"
        for targeted in (self.attacks.apgd_targeted, self.attacks.fab):
            # A target is a wrong class, of which a model with few classes has fewer than nine.
            targeted.n_target_classes = min(TARGETS, num_classes - 1)
        # The package warns of vanishing gradients, and of Square being ahead of the others; checks.py measures both.
        logging.getLogger("auto-attack").setLevel(logging.ERROR)

    def run(self, name: str, images: Tensor, labels: Tensor, indices: Tensor) -> Tensor:
        """One of SUB_ATTACKS on correctly classified images -> [B,C,H,W]: adversarial where it succeeded.

        indices   int64 [B], the images' indices in the data set; the first is part of the seed, with the attack's name
        """
        attack = {
            "apgd-ce": self.attacks.apgd,
            "apgd-t": self.attacks.apgd_targeted,
            "fab-t": self.attacks.fab,
            "square": self.attacks.square,
        }[name]
        # Not hash(), which Python salts anew in every process: a resumed evaluation would draw other numbers.
        digest = hashlib.sha256(f"{self.seed} {name} {int(indices[0])}".encode()).digest()
        attack.seed = int.from_bytes(digest[:4], "little")
        # The package seeds torch's global generators.
        with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):
            return attack.perturb(images, labels).detach()


def refusal(num_classes: int | None) -> str:
    """Why AutoAttack cannot run on a model with so many classes (None: unknown); empty if it can."""
    if num_classes is not None and num_classes < FEWEST_CLASSES:
        return f"needs {FEWEST_CLASSES} classes or more (targeted DLR loss), the model has {num_classes}; take pgd-100 and cw"
    try:
        _package()
    except ImportError as error:
        return f"needs the package pyautoattack: pip install 'mimir-fast[eval]' ({error})"
    return ""


def version() -> str:
    """The package's name and version."""
    return f"pyautoattack {_package().__version__}"


def _package():
    # Installed with the extra "eval" only.
    import pyautoattack

    return pyautoattack
