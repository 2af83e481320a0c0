"""Running an attack on all images, batch by batch, each saved.  Shapes: B batch, C channels, H W sides, O classes."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mimir_fast.attacks.adaptive import feature_loss, mutual_information_loss
from mimir_fast.attacks.l2 import norms
from mimir_fast.attacks.named import Attack, Loss, cross_entropy, fgsm, gradient_attack, margin_loss
from mimir_fast.checkpoints.errors import CheckpointError
from mimir_fast.data.crops import to_float
from mimir_fast.evaluate.autoattack import PASSES, SUB_ATTACKS, AutoAttack
from mimir_fast.evaluate.images import Chosen
from mimir_fast.evaluate.progress import AttackProgress
from mimir_fast.evaluate.records import Record
from mimir_fast.evaluate.team import ALONE, Team
from mimir_fast.models.features import FeatureClassifier, FeatureModel
from mimir_fast.training.captured_calls import CapturedCalls
from mimir_fast.training.step_graph import CudaRecorder, Recorder

# For the rounding of x + eps in fp32; in the L2 norm the errors of all pixels add up, by the root of their number.
SLACK, SLACK_L2 = 1e-6, 3e-5


class Subject(NamedTuple):
    """The evaluated model: of pixels in [0,1], in fp32 and eval mode, without trainable parameters.

    source    where it is from, for messages
    launch    whether attacks on it are launched as CUDA graphs, where they can be
    """

    model: nn.Module
    num_classes: int
    source: str
    device: torch.device
    launch: bool = True


class Sizes(NamedTuple):
    """Images at a time: in the model, and in AutoAttack, whose random numbers depend on a group of images."""

    batch: int
    aa: int


# (images [B,C,H,W], labels [B], indices [B]) -> adversarial images [B,C,H,W]
Perturb = Callable[[Tensor, Tensor, Tensor], Tensor]


class Round(NamedTuple):
    """One pass of an attack over the images.

    passes       its cost per image, in forward passes
    launchable   whether it is work on the device alone, of one shape for batches of one size: a CUDA graph can hold it
    """

    name: str
    passes: float
    run: Perturb
    launchable: bool = False


def rounds_of(attack: Attack, subject: Subject, sizes: Sizes, seed: int) -> list[Round]:
    """The rounds of an attack.  Raises ValueError if it cannot run on this model or a package is missing."""
    model = subject.model
    if attack.kind == "clean":
        return [Round("clean", 1, lambda images, labels, indices: images)]
    if attack.kind == "fgsm":
        return [Round("fgsm", 3, lambda images, labels, indices: fgsm(model, images, labels, attack.eps), True)]
    if attack.is_ensemble:
        norm = "L2" if attack.in_l2 else "Linf"
        ensemble = AutoAttack(model, subject.num_classes, attack.eps, seed, subject.device, sizes.batch, norm)
        # Never a CUDA graph: the package decides on the host, step by step, which images it goes on attacking.
        return [Round(name, PASSES[name], partial(ensemble.run, name)) for name in SUB_ATTACKS]
    make_loss = _loss_of(attack, model)

    def start(restart: int) -> Perturb:
        return lambda images, labels, indices: gradient_attack(
            make_loss(images, labels), images, indices, attack, seed, restart
        )

    # Two passes a step, forward and backward, and the forward pass that rates the result.
    return [Round(f"restart {i + 1}", 2 * attack.steps + 1, start(i), True) for i in range(attack.restarts)]


def _loss_of(attack: Attack, model: nn.Module) -> Callable[[Tensor, Tensor], Loss]:
    """(images, labels) -> the loss that a gradient attack ascends."""
    if attack.kind in ("pgd", "pgd-l2"):
        return lambda images, labels: cross_entropy(model, labels)
    if attack.kind == "cw":
        return lambda images, labels: margin_loss(model, labels)
    if attack.kind == "pgd-mi" and isinstance(model, FeatureClassifier):
        return lambda images, labels: mutual_information_loss(model, labels, attack.weight)
    if attack.kind == "pgd-feature" and isinstance(model, FeatureModel):
        return lambda images, labels: feature_loss(model, images)
    raise ValueError(f"attacks: {attack.kind} needs a model with features, got {type(model).__name__}")


def run_attack(
    attack: Attack,
    subject: Subject,
    chosen: Chosen,
    record: Record,
    sizes: Sizes,
    seed: int,
    say: Callable[[str], None] = print,
    team: Team = ALONE,
) -> list[str]:
    """Run what is left of an attack's rounds on the images of a record, saved after every batch; returns the rounds' names.

    team   the processes that share the batches, all of which call; afterwards all hold the whole record

    Raises CheckpointError for logits that are NaN or infinite, OSError if the record cannot be written, RuntimeError if an
    adversarial image is farther than eps away, which is a bug.
    """
    rounds = rounds_of(attack, subject, sizes, seed)
    size = sizes.aa if attack.is_ensemble else sizes.batch
    # Then all images, in every round: batches must not depend on what earlier rounds broke.
    everything = attack.batch_dependent
    progress = AttackProgress(attack.name, [r.passes for r in rounds], everything, say, shown=team.is_main)
    recorder = recorder_for(subject.device) if subject.launch else None
    try:
        for index, round in enumerate(rounds, 1):
            with launched(round, recorder, say) as round:
                progress.begin()
                for rows, images, labels in chosen.batches(team.dealt(record.left(index, everything), size), size):
                    started = time.perf_counter()
                    indices = torch.from_numpy(record.indices[rows])
                    seen = outcome(round, attack, subject, sizes.batch, images, labels, indices)
                    record.note(rows, index, labels.numpy(), *seen)
                    # The outcome lies on the host: the device has finished, so that the time is the batch's own.
                    record.seconds += time.perf_counter() - started
                    record.save()
                    others = team.others(len(rows), int((record.broken[rows] == index).sum()))
                    progress.update(record, index, round.name, len(rows), others)
            team.merge(record)
    finally:
        progress.close()
    return [round.name for round in rounds]


def recorder_for(device: torch.device) -> Recorder | None:
    """What captures attacks on this device; None where nothing can."""
    return CudaRecorder(device) if device.type == "cuda" else None


@contextmanager
def launched(round: Round, recorder: Recorder | None, say: Callable[[str], None]) -> Iterator[Round]:
    """Context with the round as a CUDA graph for batches of the first one's size, where it can be one."""
    if recorder is None or not round.launchable:
        yield round
        return
    with recorder.context(), CapturedCalls(round.run, recorder, say) as captured:
        yield round._replace(run=captured)


def outcome(
    round: Round, attack: Attack, subject: Subject, batch_size: int, images_u8: Tensor, labels: Tensor, indices: Tensor
) -> tuple[np.ndarray, np.ndarray]:
    """The predicted classes [B] after a round, and their cross-entropy [B]."""
    images, labels = to_float(images_u8.to(subject.device)), labels.to(subject.device)
    # A graph reads indices on the device; AutoAttack takes its seed from the first one, on the host.
    if round.launchable:
        indices = indices.to(subject.device)
    adv = round.run(images, labels, indices)
    # Checked for every batch: an attack that leaves its ball would make a model look worse than it is.
    farthest = distance(adv - images, attack.in_l2)
    allowed = attack.radius + (SLACK_L2 if attack.in_l2 else SLACK)
    if not (farthest <= allowed and adv.min() >= 0 and adv.max() <= 1):
        raise RuntimeError(f"{round.name}: an adversarial image is {farthest:g} away, allowed {attack.radius:g}")
    with torch.no_grad():
        # A group of AutoAttack's may hold more images than fit into the model at a time.
        logits = torch.cat([subject.model(part) for part in adv.split(batch_size)])
    check_logits(logits, subject)
    losses = F.cross_entropy(logits, labels, reduction="none")
    return logits.argmax(dim=1).cpu().numpy().astype(np.int32), losses.cpu().numpy()


def distance(moves: Tensor, in_l2: bool) -> float:
    """The norm of the largest perturbation [B,C,H,W]: L2, in fp64, or L-infinity."""
    # A sum of squares in fp32 would add a rounding error of its own to the distance that is checked.
    return (norms(moves.double()) if in_l2 else moves.abs()).max().item()


def check_logits(logits: Tensor, subject: Subject) -> None:
    """Raise CheckpointError for logits [B,O] that are NaN or infinite, ValueError for another number of classes."""
    # argmax of NaN is a class as well: a broken model would have an accuracy.
    if not logits.isfinite().all():
        raise CheckpointError(f"checkpoint: {subject.source} answers NaN or infinity; its parameters are no use")
    if logits.shape[1] != subject.num_classes:
        raise ValueError(
            f"nb_classes: {subject.source} has {logits.shape[1]}, the images {subject.num_classes} classes"
        )
