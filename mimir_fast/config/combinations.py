"""Combinations of flags that do not do what they say, each with its line: what cannot be reached, what has no effect."""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from mimir_fast.attacks.named import Attack, parse_attacks

Flat = dict[str, Any]


class Condition(NamedTuple):
    """flags that were asked for without effect unless `holds`, and what they need, in words."""

    flags: tuple[str, ...]
    holds: Callable[[Flat], Any]
    needed: str


EDM = Condition(("unsup_fraction", "aux_data_filename"), lambda f: f["use_edm"], "--use_edm")
PRETRAINING = (
    EDM,
    Condition(("attack_mask_ratio",), lambda f: f["attack"] != "plain", "--attack pgd_mae"),
    Condition(("mi_xpl", "penalty_batch"), lambda f: f["mi_train"] != "plain", "--mi_train"),
)
FINETUNING = (
    EDM,
    Condition(("edm_aug",), lambda f: f["use_edm"], "--use_edm"),
    Condition(("trades_beta",), lambda f: f["attack_train"] in ("trades", "mart"), "--attack_train trades or mart"),
    Condition(("alpha_end",), lambda f: f["alpha_schedule"] != "constant", "--alpha_schedule linear or cosine"),
    Condition(
        ("eps_warmup_epochs", "alpha_warmup_epochs", "alpha_schedule", "warmup_aa"),
        lambda f: f["attack_train"] != "plain",
        "an attack (--attack_train)",
    ),
    Condition(
        ("mixup_prob", "mixup_switch_prob", "mixup_mode"),
        lambda f: f["mixup"] or f["cutmix"] or f["cutmix_minmax"] or f["warmup_aa"],
        "--mixup or --cutmix",
    ),
    Condition(("remode", "recount"), lambda f: f["reprob"], "--reprob above 0"),
    Condition(("mi_xz", "mi_yz"), lambda f: f["mi_loss"] != "plain", "--mi_loss dib_mi"),
    Condition(("model_ema_decay",), lambda f: f["model_ema"], "--model_ema"),
    Condition(
        ("val_every",),
        lambda f: f["val_attack"] != "none" or f["held_out"] or f["val_list"],
        "--val_attack, --held_out or --val_list",
    ),
    Condition(("adap_eval",), lambda f: f["eval"], "--eval"),
)


def _attacks(flat: Flat) -> tuple[Attack, ...]:
    return parse_attacks(flat["attacks"], 1, 1)


HELD_OUT = Condition(("held_out",), lambda f: f["split"] == "held_out", "--split held_out")
EVALUATION = (
    HELD_OUT,
    Condition(("mi_weight",), lambda f: "pgd-mi" in f["attacks"], "pgd-mi in --attacks"),
    Condition(("aa_batch",), lambda f: any(attack.is_ensemble for attack in _attacks(f)), "aa in --attacks"),
    Condition(
        ("alpha",),
        lambda f: any(attack.steps and not attack.in_l2 for attack in _attacks(f)),
        "an attack of several steps in --attacks",
    ),
    Condition(
        ("restarts",), lambda f: any(attack.steps for attack in _attacks(f)), "an attack of several steps in --attacks"
    ),
    Condition(("eps_l2",), lambda f: any(attack.in_l2 for attack in _attacks(f)), "pgd-l2 or aa-l2 in --attacks"),
    Condition(("alpha_l2",), lambda f: any(a.steps and a.in_l2 for a in _attacks(f)), "pgd-l2 in --attacks"),
)


def without_effect(conditions: Iterable[Condition], flat: Flat, explicit: set[str]) -> list[str]:
    """A line for every flag that was set and has no effect beside the others."""
    return [
        f"{name}: has no effect without {needed}"
        for flags, holds, needed in conditions
        for name in flags
        if name in explicit and not holds(flat)
    ]


def idle_attack(flat: Flat, attacked: bool) -> list[str]:
    """Lines about an attack of training that moves nothing."""
    if not attacked:
        return []
    if flat["eps"] == 0:
        return ["eps: 0: adversarial images are the clean ones"]
    if flat["steps"] == 0:
        return ["steps: 0: the attack moves no image beyond its random start"]
    scheduled = flat.get("alpha_schedule", "constant") != "constant" and flat["alpha_end"]
    if flat["alpha"] == 0 and not scheduled and flat.get("attack_train") != "apgd":
        return ["alpha: 0: the attack never leaves its random start"]
    return []


def unreached(flat: Flat) -> list[str]:
    """Lines about what a run of so many epochs never reaches."""
    lines = []
    last = flat["epochs"] - 1
    for name, value in (("eps_warmup_epochs", "eps"), ("alpha_warmup_epochs", "alpha")):
        if flat.get(name, 0) > last:
            reached = flat[value] * last / flat[name]
            lines.append(
                f"{name}: {flat[name]} of {flat['epochs']} epochs: {value} ends at {reached:.3g}/255 and never reaches "
                f"{flat[value]:g}"
            )
    if flat["start_epoch"] >= flat["epochs"]:
        lines.append(f"start_epoch: {flat['start_epoch']} of {flat['epochs']} epochs: nothing is left to train")
    return lines
