"""Arms of the demo: the three classifiers that it compares, and the commands that make them, as a user would type them."""

from pathlib import Path
from typing import NamedTuple

from mimir_fast.config import finetuning_recipes as fine_tuning
from mimir_fast.config import pretraining_recipes as pretraining
from mimir_fast.config.finetuning import FinetuneConfig
from mimir_fast.config.pretraining import PretrainConfig
from mimir_fast.models.family import PREFIX

RECIPE = ["--recipe", "digits_demo"]
# That recipe's classifier, and the side of its images in pixels.
MODEL, SIDE = fine_tuning.digits_demo().model.model, fine_tuning.digits_demo().model.input_size
# In 1/255, of the attacks on the finished classifiers.
EPS, ALPHA = 4, 1
EVALUATION = f"--device cpu --eps {EPS} --alpha {ALPHA}"
# Attacks on all test images, and on a few of them: what is compared with AutoAttack must be on the same ones.
WIDE = "clean,pgd-20"
AUTO = "pgd-20,aa"


class Arm(NamedTuple):
    """One of the compared classifiers: its name, its folder, and the --attack of its pre-training (None: not pre-trained)."""

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


class Command(NamedTuple):
    """One command of the demo.

    title     for people
    verb      of mimir-fast, with the words of its command line
    product   a file that exists when it is done
    share     roughly its time, in any unit
    """

    title: str
    verb: str
    words: list[str]
    product: Path
    share: float


def places(arm: Arm, root: Path) -> Places:
    """The folders of an arm."""
    return Places(*(root / arm.folder / name for name in Places._fields))


def commands(arm: Arm, root: Path, seed: int, aa_images: int, model: str = MODEL, side: int = SIDE) -> list[Command]:
    """The commands of an arm in order; each continues where it was stopped.

    aa_images: test images for AutoAttack; 0: none.  model: the classifier's name; side: of the images [pixels].
    """
    at = places(arm, root)
    plan: list[Command] = []
    start: list[str] = []
    if arm.attack:
        # An attack step doubles the time of pre-training.
        encoder = _last_checkpoint(at.pretraining, pretraining.digits_demo())
        words = [*RECIPE, *_sizes(PREFIX, model, side), "--attack", arm.attack, *_run(at.pretraining, seed)]
        plan.append(
            Command(f"{arm.name}: pre-training", "pretrain", words, encoder, 20 if arm.attack == "plain" else 40)
        )
        start = ["--finetune", str(encoder)]
    classifier = _last_checkpoint(at.fine_tuning, fine_tuning.digits_demo())
    words = [*RECIPE, *_sizes("", model, side), *start, *_run(at.fine_tuning, seed)]
    plan.append(Command(f"{arm.name}: adversarial fine-tuning", "finetune", words, classifier, 45))
    words = ["--checkpoint", str(classifier), *EVALUATION.split(), "--seed", str(seed)]
    wide = [*words, "--attacks", WIDE, "--output_dir", str(at.evaluation)]
    plan.append(Command(f"{arm.name}: clean and PGD-20", "evaluate", wide, at.evaluation / "results.json", 5))
    if aa_images:
        narrow = [*words, "--attacks", AUTO, "--num_images", str(aa_images), "--output_dir", str(at.autoattack)]
        title = f"{arm.name}: AutoAttack on {aa_images} images"
        plan.append(Command(title, "evaluate", narrow, at.autoattack / "results.json", 60))
    return plan


def _sizes(prefix: str, model: str, side: int) -> list[str]:
    """Words for what differs from the recipe's."""
    words = [] if model == MODEL else ["--model", prefix + model]
    return words if side == SIDE else [*words, "--input_size", str(side)]


def _run(folder: Path, seed: int) -> list[str]:
    return ["--output_dir", str(folder), "--log_dir", str(folder), "--seed", str(seed), "--resume", "auto"]


def _last_checkpoint(folder: Path, recipe: PretrainConfig | FinetuneConfig) -> Path:
    return folder / f"checkpoint-{recipe.optim.epochs - 1}.pth"
