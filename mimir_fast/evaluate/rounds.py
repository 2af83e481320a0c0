"""An attack on all images, batch by batch, on disk after each.  Shapes: B batch, C channels, H W sides, O classes."""

import time
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mimir_fast.attacks.adaptive import feature_loss, mutual_information_loss
from mimir_fast.attacks.named import Attack, cross_entropy, fgsm, gradient_attack, margin_loss
from mimir_fast.checkpoints.errors import CheckpointError
from mimir_fast.data.crops import to_float
from mimir_fast.evaluate.autoattack import PASSES, SUB_ATTACKS, AutoAttack
from mimir_fast.evaluate.images import Chosen
from mimir_fast.evaluate.progress import Progress
from mimir_fast.evaluate.records import Record

SLACK = 1e-6  # rounding of x + eps in fp32


class Subject(NamedTuple):
    """A model of pixels in [0,1], fp32, eval mode, nothing to train; source: where it is from; device: where it is."""

    model: nn.Module
    num_classes: int
    source: str
    device: torch.device


class Sizes(NamedTuple):
    """Images at a time: in the model, and in AutoAttack, whose random numbers belong to a group of images."""

    batch: int
    aa: int


class Round(NamedTuple):
    """One go at the images: (images [B,C,H,W], labels [B], numbers [B]) -> adversarial images; passes: cost per image."""

    name: str
    passes: float
    run: Callable[[Tensor, Tensor, Tensor], Tensor]


def rounds_of(attack: Attack, subject: Subject, sizes: Sizes, seed: int) -> list[Round]:
    """What an attack consists of.  Raises ValueError if it cannot be had."""
    model = subject.model
    if attack.kind == "clean":
        return [Round("clean", 1, lambda images, labels, numbers: images)]
    if attack.kind == "fgsm":
        return [Round("fgsm", 3, lambda images, labels, numbers: fgsm(model, images, labels, attack.eps))]
    if attack.kind == "aa":
        ensemble = AutoAttack(model, subject.num_classes, attack.eps, seed, subject.device, sizes.batch)
        return [Round(name, PASSES[name], lambda *batch, name=name: ensemble.run(name, *batch)) for name in SUB_ATTACKS]
    losses = {
        "pgd": lambda images, labels: cross_entropy(model, labels),
        "cw": lambda images, labels: margin_loss(model, labels),
        "pgd-mi": lambda images, labels: mutual_information_loss(model, labels, attack.weight),
        "pgd-feature": lambda images, labels: feature_loss(model, images),
    }
    if attack.kind in ("pgd-mi", "pgd-feature") and not hasattr(model, "forward_features"):
        raise ValueError(f"attacks: {attack.kind} needs a model with features, got {type(model).__name__}")

    def start(restart: int) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        loss = losses[attack.kind]
        return lambda images, labels, numbers: gradient_attack(
            loss(images, labels), images, numbers, attack, seed, restart
        )

    return [Round(f"restart {i + 1}", 2 * attack.steps + 1, start(i)) for i in range(attack.restarts)]


def run_attack(
    attack: Attack,
    subject: Subject,
    chosen: Chosen,
    record: Record,
    sizes: Sizes,
    seed: int,
    say: Callable[[str], None] = print,
) -> list[str]:
    """Let the images of a record go through what is left of an attack's rounds; returns the rounds' names.

    After every batch the record is on disk.  Raises CheckpointError for a model that answers NaN or infinity, OSError if
    the disk refuses, RuntimeError if an attack leaves its ball, which is a bug.
    """
    rounds = rounds_of(attack, subject, sizes, seed)
    size = sizes.aa if attack.kind == "aa" else sizes.batch
    everything = attack.batch_dependent
    progress = Progress(attack.name, [r.passes for r in rounds], everything, say)
    try:
        for index, round in enumerate(rounds, 1):
            for rows, images, labels in chosen.batches(record.left(index, everything), size):
                started = time.perf_counter()
                numbers = torch.from_numpy(record.number[rows])
                seen = outcome(round, attack.eps, subject, sizes.batch, images, labels, numbers)
                record.note(rows, index, labels.numpy(), *seen)
                record.seconds += time.perf_counter() - started
                record.save()
                progress.update(record, index, round.name, len(rows))
    finally:
        progress.close()
    record.save()
    return [round.name for round in rounds]


def outcome(
    round: Round, eps: float, subject: Subject, batch_size: int, images_u8: Tensor, labels: Tensor, numbers: Tensor
) -> tuple[np.ndarray, np.ndarray]:
    """What the model sees after a round [B] and its cross-entropy [B]."""
    images, labels = to_float(images_u8.to(subject.device)), labels.to(subject.device)
    adv = round.run(images, labels, numbers)
    farthest = (adv - images).abs().max().item()
    if not (farthest <= eps / 255 + SLACK and adv.min() >= 0 and adv.max() <= 1):
        raise RuntimeError(f"{round.name}: an adversarial image is {farthest * 255:g}/255 away, allowed {eps:g}/255")
    with torch.no_grad():
        logits = torch.cat([subject.model(part) for part in adv.split(batch_size)])
    check_logits(logits, subject)
    losses = F.cross_entropy(logits, labels, reduction="none")
    return logits.argmax(dim=1).cpu().numpy().astype(np.int32), losses.cpu().numpy()


def check_logits(logits: Tensor, subject: Subject) -> None:
    """Raises CheckpointError for logits [B,O] that are no numbers, ValueError for another number of classes."""
    if not logits.isfinite().all():
        raise CheckpointError(f"checkpoint: {subject.source} answers NaN or infinity; its parameters are no use")
    if logits.shape[1] != subject.num_classes:
        raise ValueError(
            f"nb_classes: {subject.source} has {logits.shape[1]}, the images {subject.num_classes} classes"
        )
