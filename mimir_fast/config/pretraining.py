"""Configuration of a pre-training run: one frozen dataclass per section, each field one command-line flag.

Name, type, default, unit and meaning of a flag stand here or, where fine-tuning has it too, in mimir_fast/config/sections.py;
mimir_fast/cli/parser.py turns them into the command line.  Flags marked `new` are not in the original.
"""

from dataclasses import dataclass

from mimir_fast.config import combinations, sections
from mimir_fast.config.choices import ATTACKS, MI_TRAIN, PENALTIES, PENALTY_BATCHES
from mimir_fast.config.combinations import idle_attack, unreached, without_effect
from mimir_fast.config.fields import Configuration, flag, inherited, require
from mimir_fast.config.sections import ComputeConfig, DistConfig, OptimConfig, RunConfig, check_shared
from mimir_fast.models.families import find, listed


@dataclass(frozen=True)
class ModelConfig:
    """What is trained."""

    model: str = flag("mae_vit_ti_patch16", f"model name: {listed(pretraining=True)}; the default is mae_vit_ti")
    input_size: int = flag(224, "side of the square input", "pixels")
    patch_size: int = flag(16, "side of a patch; must divide input_size", "pixels")
    mask_ratio: float = flag(0.75, "removed patches in the training pass", "share, 0 to 1")
    norm_pix_loss: bool = flag(False, "normalise every target patch by its own mean and standard deviation")


@dataclass(frozen=True)
class DataConfig(sections.DataConfig):
    """Where images come from."""

    edm_aug: str = inherited(
        sections.DataConfig,
        "edm_aug",
        help="accepted for compatibility; generated images always get crop and flip, as in the original",
        compat="is read as base",
    )
    use_normalize: bool = inherited(
        sections.DataConfig,
        "use_normalize",
        help="feed mean/std-normalised images; eps and alpha are divided by each channel's std",
    )
    data_threads: int = flag(
        4,
        "threads per GPU that read crops where --data_root is a cache, in place of --num_workers",
        "threads",
        new=True,
    )


@dataclass(frozen=True)
class AttackConfig:
    """The PGD-MAE attack."""

    attack: str = flag(
        "plain",
        "plain trains a clean masked autoencoder, pgd_mae under attack",
        choices=ATTACKS,
        compat="switches the attack on",
    )
    steps: int = flag(1, "attack steps", "steps")
    eps: float = flag(8.0, "radius of the L-infinity ball", "1/255")
    alpha: float = flag(10.0, "attack step size", "1/255")
    attack_mask_ratio: float = flag(0.75, "removed patches in the attack's passes", "share, 0 to 1", new=True)


@dataclass(frozen=True)
class PenaltyConfig:
    """The mutual-information penalty (only with an attack)."""

    mi_train: str = flag(
        "plain",
        "the penalty, plain: none; dib_mi is Rényi's of order 1.01, renyi2 of order 2, which needs no eigenvalues",
        choices=MI_TRAIN,
        compat="means no penalty",
    )
    mi_xpl: float = flag(1e-5, "weight of the penalty", "loss per unit of the penalty")
    penalty_batch: str = flag(
        "local",
        "images that the penalty compares where there are several processes; local: each process its own micro-batch, as in "
        "the original, so that the penalty's value depends on images per process; global: the micro-batches of all processes "
        "together, with the value and gradient of one process that holds them all",
        choices=PENALTY_BATCHES,
        new=True,
    )
    mi_xl: float = flag(0.0, "accepted for compatibility; the original never reads it")


@dataclass(frozen=True)
class PretrainConfig(Configuration):
    """Everything a pre-training run depends on."""

    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    attack: AttackConfig = AttackConfig()
    penalty: PenaltyConfig = PenaltyConfig()
    optim: OptimConfig = OptimConfig()
    compute: ComputeConfig = ComputeConfig()
    run: RunConfig = RunConfig()
    dist: DistConfig = DistConfig()

    def check(self) -> "PretrainConfig":
        """Return self if every value is possible; raises ValueError naming the flag, its value and what is allowed."""
        super().check()
        find(self.model.model, pretraining=True)
        flat = self.flat()
        check_shared(flat)
        require(flat["data_threads"] >= 1, "data_threads", flat["data_threads"], "1 or more")
        for name in ("mask_ratio", "attack_mask_ratio"):
            require(0 < flat[name] < 1, name, flat[name], "a share between 0 and 1 (exclusive)")
        patches = (flat["input_size"] // flat["patch_size"]) ** 2
        for name in ("mask_ratio", "attack_mask_ratio"):
            require(
                int(patches * (1 - flat[name])) >= 1, name, flat[name], f"low enough to keep one of {patches} patches"
            )
        return self

    def notes(self, explicit: set[str]) -> list[str]:
        notes, wanted = [], self.penalty.mi_train
        if wanted not in MI_TRAIN:
            notes.append(f"mi_train: {wanted!r} is none of {', '.join(PENALTIES)}: NO penalty, as in the original")
        if self.attack.attack == "plain" and wanted in PENALTIES:
            notes.append(
                "attack: plain switches the penalty off too, as in the original; --attack pgd_mae switches both on"
            )
        elif self.penalty.mi_xpl == 0 and wanted in PENALTIES:
            notes.append(f"mi_xpl: 0: {wanted} is computed and has no weight")
        flat = self.flat()
        notes += [*idle_attack(flat, self.attack.attack != "plain"), *unreached(flat)]
        return notes + without_effect(combinations.PRETRAINING, flat, explicit)
