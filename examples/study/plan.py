"""What the study runs, as data: candidates for the recipe, arms, factors, and how much of everything.

Flags are those of `mimir-fast pretrain` and `finetune`; eps and alpha in 1/255.
"""

from dataclasses import dataclass, field
from typing import NamedTuple

Flags = dict[str, str | int | float | bool]


class Candidate(NamedTuple):
    """A recipe of fine-tuning that is tried on held-out images: its name, its radius, its other flags."""

    name: str
    eps: float
    flags: Flags


class Arm(NamedTuple):
    """Classifiers that are trained alike but for the seed.

    name         of its folder and rows; title: for people
    pretraining  what differs from the study's pre-training; None: it starts from scratch
    epochs       of fine-tuning beyond the recipe's
    hidden       the attack of pre-training reaches no visible patch (hidden_attack.py)
    """

    name: str
    title: str
    pretraining: Flags | None
    epochs: int = 0
    hidden: bool = False


@dataclass(frozen=True)
class Study:
    """A study: everything that decides its results, but for the machine.

    data          flags of all trainings
    per_class     training and validation images of each class, the first ones of the data set; 0: all
    held_out      training images that fine-tuning leaves out, to choose the recipe by
    pretraining, fine_tuning   flags; eps, alpha and a candidate's flags of fine-tuning come from the recipe
    least         clean and PGD-20 accuracy that the recipe must reach on the held-out images
    search_seed   of the search, none of the arms'
    compared      arms and their number of seeds; varied: the same for the arms of one factor each
    pairs         names of compared arms whose difference is shown: the first minus the second
    factors       name -> value, for people, -> arm
    test_images   of an evaluation; aa_images: those of them that AutoAttack gets, 0: it is left out
    analyzed      images of an analysis; 0: it is left out
    """

    data: Flags
    held_out: int
    pretraining: Flags
    fine_tuning: Flags
    candidates: tuple[Candidate, ...]
    compared: tuple[tuple[Arm, ...], int]
    varied: tuple[tuple[Arm, ...], int] = ((), 0)
    pairs: tuple[tuple[str, str], ...] = ()
    factors: dict[str, dict[str, str]] = field(default_factory=dict)
    per_class: tuple[int, int] = (0, 0)
    train_images: int = 0
    least: tuple[float, float] = (0.30, 0.20)
    search_seed: int = 100
    test_images: int = 1000
    aa_images: int = 48
    analyzed: int = 512


def _tuned(eps: float, lr: float, batch_size: int = 64, **others: float) -> Candidate:
    words = [f"eps{eps:g}", f"lr{lr:g}", f"batch{batch_size}", *(f"{k}{v:g}" for k, v in others.items())]
    return Candidate("-".join(words), eps, {"lr": lr, "batch_size": batch_size, **others})


def _tried(eps: float) -> tuple[Candidate, ...]:
    """The candidates of a radius.

    On a CPU an image costs as much in a small batch as in a large one: small batches update more often.
    """
    return _tuned(eps, 1e-3, 16), _tuned(eps, 2e-3, 16), _tuned(eps, 1e-3)


ATTACKED: Flags = {"attack": "pgd_mae", "steps": 1, "eps": 8, "alpha": 10}
HSIC: Flags = {**ATTACKED, "mi_train": "hsic", "mi_xpl": 1e-5}
MIMIR = Arm("mimir-hsic", "MIMIR, HSIC", HSIC)
UNPENALISED = Arm("mimir-plain", "MIMIR, no penalty", ATTACKED)
ARMS = (
    Arm("scratch", "from scratch", None),
    Arm("mae", "MAE, no attack", {"attack": "plain"}),
    UNPENALISED,
    MIMIR,
    Arm("mimir-renyi2", "MIMIR, Rényi of order 2", {**HSIC, "mi_train": "renyi2"}),
    # Five epochs of MIMIR's pre-training take as long as six of fine-tuning.
    Arm("scratch-long", "from scratch, longer", None, epochs=6),
)
VARIED = (
    Arm("weight-1e-6", "weight 1e-6", {**HSIC, "mi_xpl": 1e-6}),
    Arm("weight-1e-4", "weight 1e-4", {**HSIC, "mi_xpl": 1e-4}),
    Arm("weight-1e-3", "weight 1e-3", {**HSIC, "mi_xpl": 1e-3}),
    Arm("hidden-attack", "attack reaches no visible patch", HSIC, hidden=True),
    Arm("eps-4", "pre-training within 4/255", {**HSIC, "eps": 4, "alpha": 5}),
    Arm("steps-3", "3 attack steps", {**HSIC, "steps": 3}),
    Arm("mask-0.5", "half of the patches removed", {**HSIC, "mask_ratio": 0.5}),
    Arm("mask-0.9", "90 % of the patches removed", {**HSIC, "mask_ratio": 0.9}),
)
CIFAR10 = Study(
    data={"dataset": "cifar10", "input_size": 32, "patch_size": 4},
    per_class=(1100, 0),
    train_images=10_000,
    held_out=1000,
    pretraining={
        **{"model": "mae_vit_nano", "norm_pix_loss": True, "batch_size": 64, "epochs": 5, "warmup_epochs": 1},
        **{"lr": 1e-3, "weight_decay": 0.05},
    },
    fine_tuning={
        **{"model": "vit_nano", "attack_train": "pgd", "steps": 1, "aa": "noaug", "reprob": 0, "drop_path": 0},
        **{"layer_decay": 1, "epochs": 6, "warmup_epochs": 1},
    },
    candidates=(*_tried(8), *_tried(4)),
    compared=(ARMS, 5),
    pairs=(
        *(("mimir-hsic", other) for other in ("scratch", "scratch-long", "mae", "mimir-plain", "mimir-renyi2")),
        *(("mimir-plain", "mae"), ("mae", "scratch"), ("scratch-long", "scratch")),
    ),
    varied=(VARIED, 3),
    factors={
        "weight of the penalty": {
            **{"0": UNPENALISED.name, "1e-6": "weight-1e-6", "1e-5": MIMIR.name},
            **{"1e-4": "weight-1e-4", "1e-3": "weight-1e-3"},
        },
        "the attack reaches": {"all patches": MIMIR.name, "removed patches alone": "hidden-attack"},
        "radius of pre-training": {"4/255": "eps-4", "8/255": MIMIR.name},
        "attack steps of pre-training": {"1": MIMIR.name, "3": "steps-3"},
        "removed patches": {"0.5": "mask-0.5", "0.75": MIMIR.name, "0.9": "mask-0.9"},
    },
)
# Handwritten digits, in two minutes: to try out the study, not to learn from.
DIGITS = Study(
    data={"dataset": "digits", "input_size": 32, "patch_size": 8},
    train_images=1400,
    held_out=100,
    pretraining={"model": "mae_vit_nano", "norm_pix_loss": True, "batch_size": 64, "epochs": 1, "warmup_epochs": 0},
    fine_tuning={**CIFAR10.fine_tuning, "epochs": 1, "warmup_epochs": 0},
    candidates=(_tuned(4, 1e-3), _tuned(4, 2e-3)),
    compared=((ARMS[0], UNPENALISED, MIMIR), 2),
    pairs=((MIMIR.name, "scratch"), (MIMIR.name, UNPENALISED.name)),
    varied=((VARIED[3],), 2),
    factors={"the attack reaches": {"all patches": MIMIR.name, "removed patches alone": "hidden-attack"}},
    least=(0.0, 0.0),
    test_images=40,
    aa_images=0,
    analyzed=64,
)
STUDIES = {"cifar10": CIFAR10, "digits": DIGITS}
