"""A classifier against a list of attacks: results.json, a table, and whether the results contradict each other."""

from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import nn

from mimir_fast.attacks.linf import gradient
from mimir_fast.attacks.named import Attack, cross_entropy, make_attack
from mimir_fast.attacks.pgd_mae import frozen_twin
from mimir_fast.data.crops import to_float
from mimir_fast.evaluate import checks
from mimir_fast.evaluate.checks import Finding, Outcome
from mimir_fast.evaluate.entries import attack_of, circumstances, key_of, model_hash, settings_of, summary, table
from mimir_fast.evaluate.images import Chosen, Images
from mimir_fast.evaluate.records import Record, Results
from mimir_fast.evaluate.rounds import Sizes, Subject, rounds_of, run_attack

CLEAN = Attack("clean")
SLICE = 100  # images that the checks attack
LARGE = Attack("pgd", 40, checks.LARGE_EPS, checks.LARGE_EPS / 8)


def original_sequence(eps: float, alpha: float, adaptive: bool = False) -> tuple[Attack, ...]:
    """What the original's --eval runs at radius eps and step alpha (1/255); adaptive: with --adap_eval."""
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
    sizes: Sizes = Sizes(64, 64),  # noqa: B008 (immutable)
    seed: int = 0,
    with_checks: bool = False,
    say: Callable[[str], None] = print,
) -> dict:
    """Evaluate; returns what results.json in output_dir holds: identity, attacks by name and settings, checks.

    model        pixels [B,3,S,S] in [0,1] -> logits; evaluated in fp32 and eval mode, and left as it is
    source       where it is from, for messages and the record
    attacks      clean accuracy is always measured: what the model misclassifies unattacked counts as broken
    with_checks  also attack a small slice of the images at a radius that nothing can survive
    Every batch is saved: called again after a kill, it goes on where it stopped and ends with the same result.
    Raises ValueError (DataError, CheckpointError), one line each.
    """
    chosen = images.choose()
    subject = _subject(model, source, len(chosen.classes))
    attacks = list(dict.fromkeys([CLEAN, *attacks]))
    for attack in attacks:  # what cannot be had should be known before hours of what can
        rounds_of(attack, subject, sizes, seed)
    identity = {"model": {"source": source, "hash": model_hash(subject.model)}, "images": chosen.identity()}
    evaluation = Evaluation(subject, chosen, Results(Path(output_dir), identity), sizes, seed, say)
    return evaluation.run(attacks, with_checks)


def _subject(model: nn.Module, source: str, num_classes: int) -> Subject:
    """The model as attacks need it; the caller's stays as it is.  Raises ValueError if its head has other classes."""
    outputs = getattr(model, "num_classes", num_classes)
    if outputs != num_classes:
        raise ValueError(f"dataset: the images have {num_classes} classes, the head of {source} has {outputs}")
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    return Subject(frozen_twin(model).float().eval(), num_classes, source, device)


class Evaluation:
    """One model on one choice of images, with the results so far."""

    def __init__(
        self,
        subject: Subject,
        chosen: Chosen,
        results: Results,
        sizes: Sizes,
        seed: int,
        say: Callable[[str], None],
    ):
        self.subject, self.chosen, self.results = subject, chosen, results
        self.sizes, self.seed, self.say = sizes, seed, say
        self.clean = np.ones(len(chosen.numbers), bool)  # which images the model gets right unattacked

    def run(self, attacks: list[Attack], with_checks: bool) -> dict:
        """All attacks, the clean one first, then the checks; returns the results, printed and saved."""
        if self.results.note:
            self.say(self.results.note)
        for attack in attacks:
            record = self.attack(attack)
            self.clean = record.correct if attack == CLEAN else self.clean
        findings = [*checks.compare(self.outcomes()), *self.slice_checks(with_checks)]
        self.results.data["checks"] = [finding._asdict() for finding in findings]
        self.results.save()
        for line in table(self.results.data):
            self.say(line)
        return self.results.data

    def attack(self, attack: Attack) -> Record:
        """Run an attack, or what is left of it, and enter it into the results."""
        settings = settings_of(attack, self.sizes, self.seed)
        key = key_of(settings)
        record = Record(self.results.record_path(key), self.chosen.numbers, self.clean)
        record.resume()
        before = record.seconds
        names = run_attack(attack, self.subject, self.chosen, record, self.sizes, self.seed, self.say)
        entries = self.results.data["attacks"]
        if key not in entries or record.seconds > before:
            path = str(record.path.relative_to(self.results.folder))
            entry = {**summary(record, names), "settings": settings, "per_image": path}
            entries[key] = entry | circumstances(attack, self.subject)
            self.results.save()
        low, high = entries[key]["interval95"]
        self.say(f"{key}: {entries[key]['accuracy']:.2%} ({low:.2%} - {high:.2%}) of {entries[key]['n']} images")
        return record

    def outcomes(self) -> list[Outcome]:
        """Every attack of the results whose images' outcomes are still there."""
        found = []
        for entry in self.results.data["attacks"].values():
            record = Record(self.results.folder / entry["per_image"], self.chosen.numbers)
            if record.resume():
                found.append(Outcome(attack_of(entry["settings"]), record))
        return found

    def slice_checks(self, large_too: bool) -> list[Finding]:
        """Checks on the first images that the model gets right; the attack at a large radius only on request, or if it has
        been run."""
        rows = np.flatnonzero(self.clean)[:SLICE]
        chosen = replace(self.chosen, numbers=self.chosen.numbers[rows])
        record = Record(self.results.record_path("check large eps"), chosen.numbers)
        there = record.resume()
        findings = [checks.vanishing_gradients(vanished(self.subject, chosen, self.sizes.batch), len(rows))]
        if large_too or there:
            run_attack(LARGE, self.subject, chosen, record, self.sizes, self.seed, self.say)
            findings.append(checks.large_eps(record))
        return findings


def vanished(subject: Subject, chosen: Chosen, batch_size: int) -> int:
    """How many images have a cross-entropy whose gradient is exactly zero in every pixel."""
    count = 0
    for _, images, labels in chosen.batches(np.arange(len(chosen.numbers)), batch_size):
        images, labels = to_float(images.to(subject.device)), labels.to(subject.device)
        _, grad = gradient(cross_entropy(subject.model, labels), images, 1.0)
        count += int((grad.flatten(1) == 0).all(dim=1).sum())
    return count
