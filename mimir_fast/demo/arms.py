"""The three classifiers that the demo compares, and the commands that make them: what a user would type."""

from pathlib import Path
from typing import NamedTuple

SIZES = "--dataset digits --input_size 32 --patch_size 8 --num_workers 0 --device cpu"
PRETRAINING = f"--recipe digits_demo {SIZES} --batch_size 64 --epochs 8 --warmup_epochs 1"
FINE_TUNING = (  # the radius grows, or what starts from scratch learns nothing
    f"--recipe digits_demo {SIZES} --batch_size 32 --epochs 4 --warmup_epochs 1 --lr 3e-4 --layer_decay 1 --drop_path 0 "
    "--eps 4 --alpha 5 --eps_warmup_epochs 3 --held_out 0 --val_every 4"
)
EVALUATION = "--device cpu --eps 4 --alpha 1"
WIDE = "clean,pgd-20"  # on all test images
AUTO = "aa"  # on a slice


class Arm(NamedTuple):
    """name for people, folder, and the --attack of its pre-training (None: there is none)."""

    name: str
    folder: str
    attack: str | None


ARMS = (
    Arm("from scratch", "scratch", None),
    Arm("MAE, no attack", "mae", "plain"),
    Arm("MIMIR", "mimir", "pgd_mae"),
)


class Places(NamedTuple):
    """Folders of an arm's runs and results."""

    pretraining: Path
    fine_tuning: Path
    evaluation: Path
    autoattack: Path


class Stage(NamedTuple):
    """What happens, the verb with the words of its command line, and the file that is there when it is done."""

    title: str
    verb: str
    words: list[str]
    product: Path


def places(arm: Arm, root: Path) -> Places:
    return Places(*(root / arm.folder / name for name in Places._fields))


def stages(arm: Arm, root: Path, seed: int, aa_images: int) -> list[Stage]:
    """In order; each goes on where it was stopped.  aa_images: test images that AutoAttack gets; 0: none."""
    at, plan, start = places(arm, root), [], []
    if arm.attack:
        encoder = _last_checkpoint(at.pretraining, PRETRAINING)
        words = [*PRETRAINING.split(), "--attack", arm.attack, *_run(at.pretraining, seed)]
        plan.append(Stage(f"{arm.name}: pre-training", "pretrain", words, encoder))
        start = ["--finetune", str(encoder)]
    classifier = _last_checkpoint(at.fine_tuning, FINE_TUNING)
    words = [*FINE_TUNING.split(), *start, *_run(at.fine_tuning, seed)]
    plan.append(Stage(f"{arm.name}: adversarial fine-tuning", "finetune", words, classifier))
    words = ["--checkpoint", str(classifier), *EVALUATION.split(), "--seed", str(seed)]
    wide = [*words, "--attacks", WIDE, "--output_dir", str(at.evaluation)]
    plan.append(Stage(f"{arm.name}: clean and PGD-20", "evaluate", wide, at.evaluation / "results.json"))
    if aa_images:
        narrow = [*words, "--attacks", AUTO, "--num_images", str(aa_images), "--output_dir", str(at.autoattack)]
        title = f"{arm.name}: AutoAttack on {aa_images} images"
        plan.append(Stage(title, "evaluate", narrow, at.autoattack / "results.json"))
    return plan


def _run(folder: Path, seed: int) -> list[str]:
    return ["--output_dir", str(folder), "--log_dir", str(folder), "--seed", str(seed), "--resume", "auto"]


def _last_checkpoint(folder: Path, words: str) -> Path:
    listed = words.split()
    return folder / f"checkpoint-{int(listed[listed.index('--epochs') + 1]) - 1}.pth"
