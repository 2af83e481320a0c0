"""Sanity checks for gradient masking: whether the results of an evaluation contradict each other.

A model can look robust because attacks get no useful gradient from it (gradient masking).  Then stronger attacks break fewer
images than weaker ones.  Attacks are compared on the same images, by the images that exactly one of them breaks.
Source: Athalye et al., Obfuscated Gradients Give a False Sense of Security, 2018; Carlini et al., On Evaluating Adversarial
Robustness, 2019.
"""

from collections.abc import Iterable
from dataclasses import replace
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from mimir_fast.attacks.named import Attack
from mimir_fast.evaluate.autoattack import SUB_ATTACKS
from mimir_fast.evaluate.records import ROBUST, Record
from mimir_fast.evaluate.statistics import mean_and_error, sign_test, wilson

FEWEST_IMAGES = 50
# p-value
SURPRISING = 0.01
# In 1/255: half of the range, within which every image can be turned into the same grey.
LARGE_EPS = 127.5
# Fraction of images that may stay correctly classified at LARGE_EPS.
STANDING = 0.05
# Fraction of all images that Square alone may break: the limit of AutoAttack's authors.
SQUARE_SHARE = 0.002
# Fraction of images that may have no gradient.
VANISHING = 0.01


class AttackResult(NamedTuple):
    """An attack and what became of the images."""

    attack: Attack
    record: Record


class Finding(NamedTuple):
    """Result of a check.  status: passed, warning, or undecided (not enough images); text: one or two sentences."""

    check: str
    status: str
    text: str


def compare(outcomes: Iterable[AttackResult]) -> list[Finding]:
    """All comparisons that attacks of equal radius on the same images allow."""
    outcomes, findings = list(outcomes), []
    for in_l2, eps in sorted({(o.attack.in_l2, o.attack.eps) for o in outcomes if o.attack.kind != "clean"}):
        same = [o for o in outcomes if (o.attack.in_l2, o.attack.eps) == (in_l2, eps)]
        kinds = ("fgsm", "pgd", "cw", "aa")
        by_kind = {kind: [o for o in same if o.attack.kind.removesuffix("-l2") == kind] for kind in kinds}
        pgds = sorted(by_kind["pgd"], key=lambda o: o.attack.steps)
        for ensemble in by_kind["aa"]:
            findings += [_aa_above(ensemble, other) for other in [*pgds[-1:], *by_kind["cw"]]]
            findings.append(_square(ensemble))
        # Neighbours in this order can differ in their steps alone.
        for fewer, more in pairwise(sorted(pgds, key=lambda o: (o.attack.alpha, o.attack.restarts, o.attack.steps))):
            if replace(fewer.attack, steps=0) == replace(more.attack, steps=0) and fewer.attack != more.attack:
                findings += [_more_steps(fewer, more), _loss_rises(fewer, more)]
        findings += [_fgsm_below(single, pgds[-1]) for single in by_kind["fgsm"] if pgds]
    return findings


def large_eps(record: Record) -> Finding:
    """record: the images that the model gets right, under PGD at LARGE_EPS."""
    standing, n = int(record.correct.sum()), len(record.indices)
    # The lower end of the interval: on a hundred images a share above the limit may be chance.
    low, _ = wilson(standing, n)
    text = f"at eps {LARGE_EPS:g}/255, where every image can be made grey, {standing} of {n} images stay correct"
    doubt = ": PGD misses adversarial images that must exist (masked gradients); the true robustness is lower"
    return _finding("large eps", low > STANDING, n, text, doubt)


def vanishing_gradients(vanished: int, n: int) -> Finding:
    """vanished: of n images that the model gets right, those whose cross-entropy has gradient zero in every pixel."""
    low, _ = wilson(vanished, n)
    text = f"the gradient of {vanished} of {n} images is zero in every pixel"
    doubt = (
        ": attacks on the cross-entropy (fgsm, pgd) leave these images unchanged; look for saturated logits or an "
        "operation without a gradient, and trust only attacks without gradients (Square)"
    )
    return _finding("vanishing gradients", low > VANISHING, n, text, doubt)


def _aa_above(ensemble: AttackResult, other: AttackResult) -> Finding:
    text, surprising, n = _disagreement(other, ensemble)
    doubt = ": AutoAttack should break more; a sign of gradient masking or of an error in the evaluation"
    return _finding("AutoAttack not above PGD", surprising, n, text, doubt)


def _more_steps(fewer: AttackResult, more: AttackResult) -> Finding:
    text, surprising, n = _disagreement(fewer, more)
    doubt = ": more steps should break more; a sign of gradient masking"
    return _finding("more steps are stronger", surprising, n, text, doubt)


def _fgsm_below(single: AttackResult, many: AttackResult) -> Finding:
    text, surprising, n = _disagreement(single, many)
    doubt = ": many steps should break more than one; a sign of gradient masking: trust the lower accuracy"
    return _finding("PGD stronger than FGSM", surprising, n, text, doubt)


def _loss_rises(fewer: AttackResult, more: AttackResult) -> Finding:
    """The loss at the last iterate should grow with the number of steps."""
    growth = more.record.loss - fewer.record.loss
    growth = growth[np.isfinite(growth)]
    mean, error = mean_and_error(growth.astype(np.float64))
    text = f"the loss grows by {mean:.3g} (standard error {error:.2g}) from {fewer.attack.name} to {more.attack.name}"
    # Three standard errors: a p-value of 0.1 %.
    falls = bool(len(growth)) and mean < -3 * error
    doubt = ": more steps should raise the loss; a sign of gradient masking"
    return _finding("loss rises with steps", falls, len(growth), text, doubt)


def _square(ensemble: AttackResult) -> Finding:
    """Square, which uses no gradient, should break little that the gradient attacks do not."""
    record, last = ensemble.record, SUB_ATTACKS.index("square") + 1
    # It comes last: what it breaks has withstood the other three.
    n, alone = len(record.indices), int((record.broken == last).sum())
    low, _ = wilson(alone, n)
    text = f"Square, which uses no gradient, breaks {alone} of {n} images that the three gradient attacks did not break"
    doubt = ": a sign of gradient masking; the true robustness is lower still"
    return _finding("Square not ahead", low > SQUARE_SHARE, n, text, doubt)


def _disagreement(weaker: AttackResult, stronger: AttackResult) -> tuple[str, bool, int]:
    """A sentence, whether the supposedly weaker attack breaks surprisingly many images that the stronger one does not, and
    the number of images."""
    fallen, standing = weaker.record.broken != ROBUST, stronger.record.broken == ROBUST
    only_weaker, only_stronger = int((fallen & standing).sum()), int((~fallen & ~standing).sum())
    a, b, unit = weaker.attack.name, stronger.attack.name, "" if stronger.attack.in_l2 else "/255"
    text = f"{a} alone breaks {only_weaker} images, {b} alone {only_stronger} (eps {stronger.attack.eps:g}{unit})"
    return text, sign_test(only_weaker, only_stronger) < SURPRISING, len(fallen)


def _finding(check: str, doubtful: bool, n: int, text: str, doubt: str) -> Finding:
    """A warning where the statistics support it, however few images there are; passing takes FEWEST_IMAGES."""
    if doubtful:
        return Finding(check, "warning", text + doubt)
    return Finding(check, "passed" if n >= FEWEST_IMAGES else "undecided", text)
