"""Schedules of fine-tuning from epoch to epoch: the attack's radius and step, and how images are mixed."""

import math

from mimir_fast.config.finetuning import AttackConfig, FinetuneConfig
from mimir_fast.data import Mixing, warmup_mixing


def radius_and_step(a: AttackConfig, epoch: int, epochs: int) -> tuple[float, float]:
    """eps and alpha in 1/255 of an epoch in a run of `epochs`: each has a warm-up, alpha may then go to alpha_end."""
    eps = a.eps * _grown(epoch, a.eps_warmup_epochs)
    if epoch < a.alpha_warmup_epochs or a.alpha_schedule == "constant":
        return eps, a.alpha * _grown(epoch, a.alpha_warmup_epochs)
    progress = (epoch - a.alpha_warmup_epochs) / max(epochs - 1 - a.alpha_warmup_epochs, 1)
    left = 1 - progress if a.alpha_schedule == "linear" else (1 + math.cos(math.pi * progress)) / 2
    return eps, a.alpha_end + (a.alpha - a.alpha_end) * left


def _grown(epoch: int, warmup_epochs: int) -> float:
    return min(epoch / warmup_epochs, 1.0) if warmup_epochs else 1.0


def warms_up(config: FinetuneConfig) -> bool:
    """Whether augmentation and mixing grow."""
    # As in the original, --warmup_aa does nothing without an attack.
    return config.augment.warmup_aa and config.attack.attack_train != "plain"


def build_mixing(config: FinetuneConfig, epoch: int) -> Mixing | None:
    """Mixup and CutMix of an epoch; None where images are not mixed, and targets are labels."""
    a, classes = config.augment, config.model.nb_classes
    # None until the data is read, which is before the first epoch.
    assert classes is not None
    probabilities = (a.mixup_prob, a.mixup_switch_prob)
    mixing = Mixing(a.mixup, a.cutmix, a.cutmix_minmax, *probabilities, a.mixup_mode, a.smoothing, classes)
    mixing = warmup_mixing(epoch, mixing) if warms_up(config) else mixing
    return mixing if mixing.active else None
