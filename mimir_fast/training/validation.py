"""Validation during training: accuracy, clean and under one attack.  Shapes: B batch, C channels, H W sides, O classes.

It is in the run's precision and meant as a guide while training; results to report come from mimir_fast.evaluate, in fp32.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mimir_fast.attacks.linf import attack_bounds, pgd
from mimir_fast.config.validation import validation_steps
from mimir_fast.data import DataError, EvalStream, to_float
from mimir_fast.models import Classifier
from mimir_fast.training.captured_calls import CapturedCalls
from mimir_fast.training.distributed import World
from mimir_fast.training.finetune_step import ClassifierAttackFunctions
from mimir_fast.training.seeds import step_seed
from mimir_fast.training.step_graph import Recorder

# Seed of the attack's starts: not the run's, so that the validations of all epochs and runs can be compared.
START_SEED = 1


class Scores(NamedTuple):
    """Means over all images of all processes: loss, accuracies in percent; robust_acc1 is None without an attack."""

    loss: float
    acc1: float
    acc5: float
    robust_acc1: float | None


class ValidationAttack(NamedTuple):
    """PGD on pixels in [0,1].

    steps        0: one step from the image itself (FGSM)
    bounds       [4,C] from attack_bounds
    loss_scale   for fp16
    """

    steps: int
    bounds: Tensor
    loss_scale: float = 1.0


def build_validation_attack(
    val_attack: str, eps: float, device: torch.device, loss_scale: float = 1.0
) -> ValidationAttack | None:
    """The attack of --val_attack; eps in 1/255.  Its step is eps for fgsm and 2.5 eps / N for pgdN, at most eps."""
    steps = validation_steps(val_attack)
    if steps is None:
        return None
    # 2.5 eps / N, so that N steps can cross the ball and go back: Madry et al., 2018.
    alpha = min(2.5 * eps / steps, eps) if steps else eps
    bounds = attack_bounds(eps, alpha, device)
    return ValidationAttack(steps, bounds, loss_scale)


def validate(
    model: Classifier,
    images: EvalStream,
    world: World,
    dtype: torch.dtype,
    attack: ValidationAttack | None = None,
    ends: Callable[[], bool] = lambda: False,
    functions: ClassifierAttackFunctions = ClassifierAttackFunctions(),  # noqa: B008 (immutable)
    fill: int = 0,
    recorder: Recorder | None = None,
) -> Scores | None:
    """Accuracy on clean images, and under the attack if there is one; None if `ends` returned True before the last batch.

    model       in evaluation mode and without trainable parameters: the attack differentiates the images alone
    images      this rank's share
    dtype       of autocast; torch.float32: no autocast
    ends        called before every batch, by all ranks together
    functions   as they are or compiled
    fill        smaller batches are filled up to so many images, so that nothing is compiled again; 0: they are not
    recorder    what captures the batches of the first one's size; None: they run as they are
    Raises DataError on every rank if one of them meets an unreadable image.
    """
    sums = torch.zeros(5, dtype=torch.float64, device=world.device)
    autocast = torch.autocast(world.device.type, dtype=dtype, enabled=dtype != torch.float32)

    def whole(images_u8: Tensor, labels: Tensor, start: Tensor) -> Tensor:
        return _batch_sums(model, images_u8, labels, len(labels), attack, start, functions)

    with CapturedCalls(whole, recorder) as captured:
        for index, batch in enumerate(_in_step(images, world)):
            if world.any(ends()):
                return None
            count = 0 if batch is None else len(batch[1])
            images_u8, labels = (_filled(part.to(world.device), fill) for part in batch or _blank(model))
            start = torch.tensor(step_seed(START_SEED, world.rank, index, 0)).to(world.device, non_blocking=True)
            # Entered anew for every batch: casts that it keeps must not outlive a capture.
            with autocast:
                if count == len(labels):
                    sums += captured(images_u8, labels, start)
                else:
                    sums += _batch_sums(model, images_u8, labels, count, attack, start, functions)
    loss, top1, top5, robust, count = (world.mean(sums) * world.size).tolist()
    return Scores(
        loss / count, 100 * top1 / count, 100 * top5 / count, None if attack is None else 100 * robust / count
    )


def _in_step(images: EvalStream, world: World) -> Iterator[tuple[Tensor, Tensor] | None]:
    """The batches of this rank, and None in place of those that only other ranks have."""
    batches = iter(images)
    for _ in range(world.largest(len(images))):
        batch = error = None
        try:
            batch = next(batches, None)
        except DataError as met:
            error = met
        if world.any(error is not None):
            raise error or DataError("an image to validate on is unreadable; another process names it")
        yield batch


def _blank(model: Classifier) -> tuple[Tensor, Tensor]:
    """A batch for a process that has none left."""
    # Every process must take part in gathering the parameters of a sharded model.
    return torch.zeros(1, 3, model.img_size, model.img_size, dtype=torch.uint8), torch.zeros(1, dtype=torch.int64)


def _filled(part: Tensor, size: int) -> Tensor:
    """A batch's images or labels, the first one repeated at the end until there are `size` of them."""
    lacking = size - len(part)
    return torch.cat([part, part[:1].expand(lacking, *part.shape[1:])]) if lacking > 0 else part


def _batch_sums(
    model: Classifier,
    images_u8: Tensor,
    labels: Tensor,
    count: int,
    attack: ValidationAttack | None,
    start: Tensor,
    functions: ClassifierAttackFunctions,
) -> Tensor:
    """Sums over the first `count` images, [5] float64 on the device: loss, correct at top 1, at top 5, under attack, count."""
    images, first = to_float(images_u8), labels[:count]
    with torch.no_grad():
        logits = functions.logits(model, images)[:count].float()
    loss = F.cross_entropy(logits, first, reduction="sum")
    best = logits.topk(min(5, logits.shape[1]), dim=1).indices == first[:, None]
    robust = torch.zeros_like(loss)
    if attack is not None:
        adv = _attacked(model, images, labels, attack, start, functions)
        with torch.no_grad():
            robust = (functions.logits(model, adv)[:count].argmax(dim=1) == first).sum()
    terms = (loss, best[:, 0].sum(), best.sum(), robust, torch.full_like(loss, count))
    return torch.stack([term.double() for term in terms])


def _attacked(
    model: Classifier,
    images: Tensor,
    labels: Tensor,
    attack: ValidationAttack,
    start: Tensor,
    functions: ClassifierAttackFunctions,
) -> Tensor:
    return pgd(
        lambda adv: functions.losses(model, adv, labels),
        images,
        attack.bounds,
        max(attack.steps, 1),
        start if attack.steps else None,
        loss_scale=attack.loss_scale,
        step=functions.step,
        begin=functions.begin,
    )
