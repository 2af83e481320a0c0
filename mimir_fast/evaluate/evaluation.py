"""Evaluation of a classifier under a list of attacks: results.json, a table, and checks for gradient masking."""

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import nn

from mimir_fast.attacks.linf import gradient
from mimir_fast.attacks.named import Attack, cross_entropy, make_attack
from mimir_fast.attacks.pgd_mae import frozen_twin
from mimir_fast.checkpoints.lock import locked
from mimir_fast.data.crops import to_float
from mimir_fast.data.splits import check_same_classes
from mimir_fast.evaluate import checks
from mimir_fast.evaluate.checks import AttackResult, Finding
from mimir_fast.evaluate.entries import attack_of, circumstances, key_of, model_hash, settings_of, summary, table
from mimir_fast.evaluate.images import Chosen, Images
from mimir_fast.evaluate.records import Record, Results
from mimir_fast.evaluate.rounds import Sizes, Subject, rounds_of, run_attack
from mimir_fast.evaluate.team import ALONE, Team
from mimir_fast.training.precision import full_precision

CLEAN = Attack("clean")
# Images that the checks attack.
SLICE = 100
# 40 steps of an eighth of the radius cross the ball more than twice.
LARGE = Attack("pgd", 40, checks.LARGE_EPS, checks.LARGE_EPS / 8)


def original_sequence(eps: float, alpha: float, adaptive: bool = False) -> tuple[Attack, ...]:
    """The attacks of the original's --eval at radius eps and step alpha (1/255); adaptive: with --adap_eval."""
    if adaptive:
        return CLEAN, make_attack("pgd-feature", eps, alpha), make_attack("pgd-mi", eps, alpha)
    return (
        CLEAN,
        make_attack("pgd-5", 1.0, 0.5),
        *(make_attack(name, eps, alpha) for name in ("pgd-20", "pgd-100", "aa")),
    )


def run_evaluation(
    model: nn.Module,
    source: str,
    images: Images,
    attacks: Iterable[Attack],
    output_dir: str | Path,
    *,
    # immutable
    sizes: Sizes = Sizes(64, 64),  # noqa: B008
    seed: int = 0,
    with_checks: bool = False,
    say: Callable[[str], None] = print,
    classes: list[str] | None = None,
    team: Team = ALONE,
    launch: bool = True,
) -> dict:
    """Evaluate a classifier; returns what results.json in output_dir holds: identity, attacks by name and settings, checks.

    model        pixels [B,3,S,S] in [0,1] -> logits; evaluated in fp32 and eval mode, and left as it is
    source       where it is from, for messages and the record
    attacks      clean accuracy is always measured too: images that are misclassified unattacked count as broken
    sizes        images in the model at a time, and in a group of AutoAttack
    seed         of the attacks' random starts
    with_checks  also attack a few images at a radius at which every image can be broken
    say          called with every line of output
    classes      names of the model's classes in the order of its logits, which must be those of the images; None: not known
    team         the processes that share the images (`joined`), all of which call; the first prints and writes
    launch       on CUDA, launch attacks as graphs where they can be: changes nothing but time and memory
    Every batch is saved: a call after a kill continues where it stopped, and ends with the same result.
    Raises ValueError (DataError, CheckpointError), one line each.
    """
    say = say if team.is_main else lambda line: None
    # Read by one: all images are.
    chosen = team.shared(lambda: images.choose(say))
    check_same_classes(classes, chosen.classes, source)
    subject = _subject(model, source, len(chosen.classes), launch)
    # Each attack once, the clean one first: those that follow leave out what it finds misclassified.
    attacks = list(dict.fromkeys([CLEAN, *attacks]))
    # For its errors: an attack that cannot run should be known before hours of those that can.
    for attack in attacks:
        rounds_of(attack, subject, sizes, seed)
    mine, folder = model_hash(subject.model), Path(output_dir)
    # Each process reads the file by itself: with unlike copies on two machines the result would be of no model.
    if len(set(team.gathered(mine))) > 1:
        raise ValueError(f"checkpoint: the processes read different parameters from {source}")
    identity = {"model": {"source": source, "hash": mine}, "images": chosen.identity()}
    # tf32 off: adversarial examples lie close to the decision boundary, where it decides otherwise than fp32.
    with full_precision(), locked(folder, say=say) if team.is_main else nullcontext():
        # Under the lock already: to open a folder's results can mean to move those of another model aside.
        results = team.shared(lambda: Results(folder, identity))
        return Evaluation(subject, chosen, results, sizes, seed, say, team).run(attacks, with_checks)


def _subject(model: nn.Module, source: str, num_classes: int, launch: bool) -> Subject:
    """A twin of the model in fp32 and eval mode without trainable parameters.  Raises ValueError for another number of
    classes."""
    outputs = getattr(model, "num_classes", num_classes)
    if outputs != num_classes:
        raise ValueError(f"dataset: the images have {num_classes} classes, the head of {source} has {outputs}")
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    return Subject(frozen_twin(model).float().eval(), num_classes, source, device, launch)


class Evaluation:
    """An evaluation of one model on one selection of images, with the results so far."""

    def __init__(
        self,
        subject: Subject,
        chosen: Chosen,
        results: Results,
        sizes: Sizes,
        seed: int,
        say: Callable[[str], None],
        team: Team = ALONE,
    ):
        self.subject, self.chosen, self.results = subject, chosen, results
        self.sizes, self.seed, self.say, self.team = sizes, seed, say, team
        # Which images are classified correctly unattacked.
        self.clean = np.ones(len(chosen.indices), bool)

    def run(self, attacks: list[Attack], with_checks: bool) -> dict:
        """Run all attacks, the clean one first, then the checks; prints, saves and returns the results."""
        if self.results.note:
            self.say(self.results.note)
        for attack in attacks:
            record = self.attack(attack)
            # The attacks that follow leave out what was misclassified unattacked.
            self.clean = record.correct if attack == CLEAN else self.clean
        # By process 0 alone: reading a record also takes in and removes the parts that a stopped call left.
        compared = checks.compare(self.outcomes()) if self.team.is_main else []
        findings = [*compared, *self.slice_checks(with_checks)]
        self.results.data["checks"] = [finding._asdict() for finding in findings]
        self.save()
        for line in table(self.results.data):
            self.say(line)
        return self.team.shared(lambda: self.results.data)

    def save(self) -> None:
        """Write results.json, on the first process."""
        if self.team.is_main:
            self.results.save()

    def attack(self, attack: Attack) -> Record:
        """Run an attack, or what is left of it, and enter it into the results."""
        settings = settings_of(attack, self.sizes, self.seed)
        key = key_of(settings)
        path = self.results.record_path(key)
        record, _ = self.team.record(path, self.chosen.indices, self.clean)
        before = record.seconds
        names = run_attack(attack, self.subject, self.chosen, record, self.sizes, self.seed, self.say, self.team)
        entries = self.results.data["attacks"]
        # An attack that was complete before keeps its entry, with the date and versions it was measured with.
        if key not in entries or record.seconds > before:
            place = str(path.relative_to(self.results.folder))
            entry = {**summary(record, names), "settings": settings, "per_image": place}
            entries[key] = entry | circumstances(attack, self.subject, self.team.world.size)
            self.save()
        low, high = entries[key]["interval95"]
        self.say(f"{key}: {entries[key]['accuracy']:.2%} ({low:.2%} - {high:.2%}) of {entries[key]['n']} images")
        return record

    def outcomes(self) -> list[AttackResult]:
        """The attacks in the results whose records of single images still exist."""
        found = []
        for entry in self.results.data["attacks"].values():
            record = Record(self.results.folder / entry["per_image"], self.chosen.indices)
            if record.resume():
                found.append(AttackResult(attack_of(entry["settings"]), record))
        return found

    def slice_checks(self, large_too: bool) -> list[Finding]:
        """Checks on the first correctly classified images; large_too: also the attack at a large radius."""
        # Those that are right alone: of the others there is nothing to break.
        rows = np.flatnonzero(self.clean)[:SLICE]
        chosen = replace(self.chosen, indices=self.chosen.indices[rows])
        record, there = self.team.record(self.results.record_path("check large eps"), chosen.indices)
        findings = [checks.vanishing_gradients(vanished(self.subject, chosen, self.sizes.batch), len(rows))]
        # Also if an earlier call ran it: its finding must not vanish from the results.
        if large_too or there:
            run_attack(LARGE, self.subject, chosen, record, self.sizes, self.seed, self.say, self.team)
            findings.append(checks.large_eps(record))
        return findings


def vanished(subject: Subject, chosen: Chosen, batch_size: int) -> int:
    """Number of images whose cross-entropy has a gradient of exactly zero in every pixel."""
    count = 0
    for _, images, labels in chosen.batches(np.arange(len(chosen.indices)), batch_size):
        images, labels = to_float(images.to(subject.device)), labels.to(subject.device)
        _, grad = gradient(cross_entropy(subject.model, labels), images, 1.0)
        count += int((grad.flatten(1) == 0).all(dim=1).sum())
    return count
