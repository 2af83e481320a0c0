"""Fine-tuning step: attack, forward passes and loss of a micro-batch, in the order of the data.

Shapes: B batch, C channels, H W sides, O classes.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from mimir_fast.attacks.apgd import apgd, momentum_step
from mimir_fast.attacks.linf import linf_step, pgd, pgd_best
from mimir_fast.attacks.pgd_mae import starting_point
from mimir_fast.config.choices import TRAINING_ATTACKS
from mimir_fast.config.fields import in_words
from mimir_fast.models import Classifier
from mimir_fast.objectives.adversarial_losses import TWO_BRANCHES, attack_losses
from mimir_fast.objectives.classification import FinetuneOutput
from mimir_fast.training.stages import stage

__all__ = [
    "ClassifierAttack",
    "ClassifierAttackFunctions",
    "ClassifierNoise",
    "FinetuneOutput",
    "attack_images",
    "draw_noise",
    "finetune_step",
]

# Standard deviation of the noise that trades and mart start from, as a fraction of the valid range.
JITTER = 0.001
# Loss scale of the attack in fp16.  Its loss is a sum over the batch, whose gradient in a logit is at most 1.
FP16_ATTACK_SCALE = 1024.0


class ClassifierAttack(NamedTuple):
    """The attack on training images.

    kind         plain: none; pgd, pgd_best: start from uniform noise; apgd: from the images; trades and mart: from small
                 normal noise.  trades ascends the divergence from the clean prediction, all others the cross-entropy
    bounds       [4,C] eps, alpha, lo, hi of every channel, from attack_bounds; None with plain.  Replace it to change them
                 between steps
    loss_scale   for fp16
    beta         weight of the robust term of trades and mart
    shared       pgd_best: with mixed targets the whole batch gets one iterate
    """

    kind: str = "plain"
    steps: int = 0
    bounds: Tensor | None = None
    loss_scale: float = 1.0
    beta: float = 6.0
    shared: bool = False


class ClassifierNoise(NamedTuple):
    """Every random draw of a step.

    start   pgd, pgd_best: a seed (one int64 number) of uniform noise, or that noise [B,C,H,W]; trades, mart: normal noise
            [B,C,H,W]
    drop    uniform draws of stochastic depth [depth,2,B]; trades, mart: [depth,2,2B], clean images first; None: none
    """

    start: Tensor | None = None
    drop: Tensor | None = None


def draw_noise(
    generator: torch.Generator, model: Classifier, images: Tensor, attack: ClassifierAttack
) -> ClassifierNoise:
    """Draw a step's randomness for images [B,C,H,W] on the generator's device (seeded by mimir_fast.training.seeds)."""
    device, start, drop = generator.device, None, None
    # In this order: a step is replayed from its seed.
    if attack.kind in ("pgd", "pgd_best"):
        start = torch.randint(2**63 - 1, (), device=device, generator=generator)
    elif attack.kind in TWO_BRANCHES:
        start = torch.randn(images.shape, device=device, generator=generator)
    if any(model.drop_rates):
        passes = 2 if attack.kind in TWO_BRANCHES else 1
        shape = (len(model.drop_rates), model.branches, passes * len(images))
        drop = torch.rand(shape, device=device, generator=generator)
    return ClassifierNoise(start, drop)


def image_losses(model: Classifier, adv: Tensor, targets: Tensor) -> Tensor:
    """Loss [B] of every image, which the attack ascends; a function of its own so that it can be compiled."""
    return attack_losses(model(adv), targets)


def image_logits(model: Classifier, images: Tensor) -> Tensor:
    """Logits [B,O] without stochastic depth."""
    return model(images)


def jitter(images: Tensor, bounds: Tensor, start: Tensor) -> Tensor:
    """Start of trades and mart: the images with normal noise of a thousandth of the range added."""
    # Not clamped to the range, as in the original.
    return images + JITTER * (bounds[3] - bounds[2])[:, None, None] * start


class ClassifierAttackFunctions(NamedTuple):
    """Functions that an attack computes with, as they are or compiled (mimir_fast.training.compilation)."""

    losses: Callable[..., Tensor] = image_losses
    logits: Callable[..., Tensor] = image_logits
    begin: Callable[..., Tensor] = starting_point
    step: Callable[..., Tensor] = linf_step
    move: Callable[..., Tensor] = momentum_step


def attack_images(
    model: Classifier,
    images: Tensor,
    targets: Tensor,
    start: Tensor | None,
    attack: ClassifierAttack,
    functions: ClassifierAttackFunctions = ClassifierAttackFunctions(),  # noqa: B008 (immutable)
) -> Tensor:
    """Adversarial versions [B,C,H,W] of the images, without stochastic depth.

    model   in evaluation mode and without trainable parameters, so that only the images are differentiated
    Raises ValueError for an unknown kind of attack and for one without bounds.
    """
    if attack.kind not in TRAINING_ATTACKS or attack.kind == "plain":
        raise ValueError(f"kind: got {attack.kind!r}, expected {in_words(TRAINING_ATTACKS[1:])}")
    if attack.bounds is None:
        raise ValueError(f"bounds: the attack {attack.kind} needs [4,C], got None")
    # KL(p || p_adv) and the cross-entropy to p have the same gradient in the image.
    if attack.kind == "trades":
        with torch.no_grad():
            targets = functions.logits(model, images).float().softmax(dim=1)

    def losses(adv: Tensor) -> Tensor:
        return functions.losses(model, adv, targets)

    ascend: Callable[..., Tensor] = pgd
    if attack.kind == "apgd":
        ascend = partial(apgd, move=functions.move)
    elif attack.kind == "pgd_best":
        ascend = partial(pgd_best, shared=attack.shared and targets.is_floating_point())
    return ascend(
        losses,
        images,
        attack.bounds,
        attack.steps,
        start,
        loss_scale=attack.loss_scale,
        step=functions.step,
        begin=jitter if attack.kind in TWO_BRANCHES else functions.begin,
    )


def finetune_step(
    objective: nn.Module,
    attacked: Classifier,
    images: Tensor,
    targets: Tensor,
    noise: ClassifierNoise,
    attack: ClassifierAttack,
    functions: ClassifierAttackFunctions = ClassifierAttackFunctions(),  # noqa: B008 (immutable)
) -> FinetuneOutput:
    """Attack, forward passes and loss of one micro-batch; the caller runs the backward pass.

    objective    a ClassificationObjective of the attack's kind, possibly wrapped in DDP
    attacked     the model that the attack runs on: frozen_twin(the objective's model).eval()
    images       [B,C,H,W] float, clean
    targets      labels [B] int64 or probabilities [B,O]
    """
    adv = images
    if attack.kind != "plain":
        with stage("attack"):
            adv = attack_images(attacked, images, targets, noise.start, attack, functions)
    return objective(images, adv, targets, noise.drop)
