"""Accuracy during training.  Shapes: B batch, C channels, H W sides, O classes.

In the run's precision and by one attack: a guide while training.  What is reported comes from mimir_fast.evaluate, in fp32.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mimir_fast.attack import linf_bounds
from mimir_fast.data import EvalStream, to_float
from mimir_fast.distributed import World
from mimir_fast.finetune.config import validation_steps
from mimir_fast.linf import pgd
from mimir_fast.models import VisionTransformer
from mimir_fast.step import step_seed

START_SEED = 1  # of the attack's starts, the same in every validation of every run


class Scores(NamedTuple):
    """Means over all images of all processes: loss, accuracies in percent; robust_acc1 None where nothing attacked."""

    loss: float
    acc1: float
    acc5: float
    robust_acc1: float | None


class ValidationAttack(NamedTuple):
    """PGD in pixels of [0,1]; bounds [4,C] from linf_bounds; steps 0: one step from the image itself (FGSM).

    loss_scale: for fp16.
    """

    steps: int
    bounds: Tensor
    loss_scale: float = 1.0


def build_validation_attack(
    val_attack: str, eps: float, device: torch.device, loss_scale: float = 1.0
) -> ValidationAttack | None:
    """From --val_attack and eps in 1/255: fgsm moves by eps once, pgdN N times by 2.5 eps / N, but never more than eps."""
    steps = validation_steps(val_attack)
    if steps is None:
        return None
    alpha = min(2.5 * eps / steps, eps) if steps else eps
    bounds = linf_bounds(eps / 255, alpha / 255, 0.0, 1.0, channels=3, device=device)
    return ValidationAttack(steps, bounds, loss_scale)


def validate(
    model: VisionTransformer,
    images: EvalStream,
    world: World,
    dtype: torch.dtype,
    attack: ValidationAttack | None = None,
    ends: Callable[[], bool] = lambda: False,
) -> Scores | None:
    """Accuracy on clean images, and under the attack if there is one; None if `ends` says so before all are seen.

    model   in evaluation mode, nothing to train: the attack differentiates the images alone
    images  this rank's share; dtype: of autocast, torch.float32 for none
    ends    asked before every batch, by all ranks together
    """
    sums = torch.zeros(5, dtype=torch.float64, device=world.device)
    autocast = torch.autocast(world.device.type, dtype=dtype, enabled=dtype != torch.float32)
    for number, batch in enumerate(_in_step(images, world)):
        if world.any(ends()):
            return None
        if batch is not None:
            with autocast:
                sums += _batch_sums(model, *(part.to(world.device) for part in batch), attack, (world.rank, number))
    loss, top1, top5, robust, count = (world.mean(sums) * world.size).tolist()
    return Scores(
        loss / count, 100 * top1 / count, 100 * top5 / count, None if attack is None else 100 * robust / count
    )


def _in_step(images: EvalStream, world: World) -> Iterator[tuple[Tensor, Tensor] | None]:
    """The batches of this rank, and None in place of those that only other ranks have."""
    batches = iter(images)
    for _ in range(world.largest(len(images))):
        yield next(batches, None)


def _batch_sums(
    model: VisionTransformer,
    images_u8: Tensor,
    labels: Tensor,
    attack: ValidationAttack | None,
    position: tuple[int, int],
) -> Tensor:
    """[5] float64 on the device: loss, right at first guess, among five guesses, right under attack, images."""
    images = to_float(images_u8)
    with torch.no_grad():
        logits = model(images).float()
    loss = F.cross_entropy(logits, labels, reduction="sum")
    best = logits.topk(min(5, logits.shape[1]), dim=1).indices == labels[:, None]
    robust = torch.zeros_like(loss)
    if attack is not None:
        adv = _attacked(model, images, labels, attack, position)
        with torch.no_grad():
            robust = (model(adv).argmax(dim=1) == labels).sum()
    terms = (loss, best[:, 0].sum(), best.sum(), robust, torch.full_like(loss, len(labels)))
    return torch.stack([term.double() for term in terms])


def _attacked(model: VisionTransformer, images: Tensor, labels: Tensor, attack: ValidationAttack, position) -> Tensor:
    start = None
    if attack.steps:
        start = torch.tensor(step_seed(START_SEED, *position, 0), device=images.device)
    return pgd(
        lambda adv: F.cross_entropy(model(adv).float(), labels, reduction="sum"),
        images,
        attack.bounds,
        max(attack.steps, 1),
        start,
        loss_scale=attack.loss_scale,
    )
