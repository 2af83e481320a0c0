"""Flags of the validation of a fine-tuning, while it runs and after it."""

import re
from dataclasses import dataclass

from mimir_fast.config import evaluation
from mimir_fast.config.fields import flag, inherited


@dataclass(frozen=True)
class ValidationConfig:
    """Evaluation."""

    eval: bool = flag(
        False, "evaluate --resume and end: clean accuracy, PGD, and AutoAttack if installed (see mimir-fast evaluate)"
    )
    adap_eval: bool = flag(False, "with --eval: the adaptive attacks of the paper instead")
    dist_eval: bool = flag(
        False, "accepted for compatibility; processes always share validation, each image once; --eval is one process's"
    )
    eval_resize: str = inherited(evaluation.DataConfig, "eval_resize", new=True)
    test_every: int = flag(1, "clean test accuracy every N epochs and in the last; 0: never", "epochs", new=True)
    val_attack: str = flag(
        "none", "attack that measures robust accuracy during training: none, fgsm or pgdN, as pgd10", new=True
    )
    val_every: int = flag(
        1, "robust accuracy and the held-out images every N epochs and in the last", "epochs", new=True
    )
    held_out: int = flag(
        0,
        "training images kept out to choose best.pth by, robust accuracy first; robust accuracy is then theirs, else the test "
        "images'",
        "images",
        new=True,
    )
    val_list: str = flag(
        "",
        "in place of --held_out: a file of paths below the test images' folder, one a line, such as RobustBench's, to choose "
        "best.pth by (ARES's choice: accuracies on these images are then those of a choice among epochs)",
        new=True,
        path=True,
    )


def validation_steps(val_attack: str) -> int | None:
    """Number of steps of --val_attack: None for none, 0 for FGSM.  Raises ValueError for another word."""
    if val_attack in ("none", "fgsm"):
        return None if val_attack == "none" else 0
    match = re.fullmatch(r"pgd-?([1-9]\d*)", val_attack)
    if match is None:
        raise ValueError(f"val_attack: got {val_attack!r}, expected none, fgsm or pgdN, as pgd10")
    return int(match[1])
