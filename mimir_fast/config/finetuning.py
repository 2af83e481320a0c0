"""Configuration of a fine-tuning run: one frozen dataclass per section, each field one command-line flag.

Sections that it shares with pre-training are in mimir_fast/config/sections.py, flags of the same name in
mimir_fast/config/pretraining.py, augmentation and validation in augmentation.py and validation.py beside it.
Flags marked `new` are not in the original.
"""

from dataclasses import dataclass

from mimir_fast.config import combinations, pretraining, sections
from mimir_fast.config.augmentation import AugmentConfig
from mimir_fast.config.choices import ALPHA_SCHEDULES, MI_LOSS, TRAINING_ATTACKS
from mimir_fast.config.combinations import idle_attack, unreached, without_effect
from mimir_fast.config.fields import Configuration, flag, inherited, require
from mimir_fast.config.sections import ComputeConfig, DistConfig, check_shared
from mimir_fast.config.validation import ValidationConfig, validation_steps
from mimir_fast.data.datasets import INFO
from mimir_fast.models.families import find, listed


@dataclass(frozen=True)
class ModelConfig:
    """What is trained."""

    model: str = flag("vit_large_patch16", f"model name: {listed(pretraining=False)}; the default is vit_large")
    finetune: str = flag(
        "", "pre-trained checkpoint to start from, a path or an https URL; empty: train from scratch", path=True
    )
    input_size: int = inherited(
        pretraining.ModelConfig,
        "input_size",
        help="side of the square input; where it is not given, the data set's own",
    )
    patch_size: int = inherited(pretraining.ModelConfig, "patch_size")
    nb_classes: int | None = flag(
        1000, "classes of the head; where it is not given, as many as the data has", "classes", type=int
    )
    global_pool: bool = flag(
        True, "the head reads the mean over the patches; --cls_token: the class token", negative="cls_token"
    )
    drop_path: float = flag(0.1, "stochastic depth of the last block, rising linearly from 0", "share, below 1")


@dataclass(frozen=True)
class DataConfig(sections.DataConfig):
    """Where images come from."""

    use_normalize: bool = inherited(
        sections.DataConfig,
        "use_normalize",
        help="normalise images by mean and std inside of the model; eps and alpha stay in pixels",
    )


@dataclass(frozen=True)
class AttackConfig:
    """Adversarial training."""

    attack_train: str = flag(
        "plain",
        "the attack on training images, plain: none; apgd: the long ImageNet recipe's, there with --steps 2 "
        "(Croce & Hein 2020), which chooses the size of its steps itself and ignores --alpha; pgd_best: ARES's, pgd that keeps "
        "each image's iterate of the highest loss",
        choices=TRAINING_ATTACKS,
    )
    attack: str = flag("pgd", "accepted for compatibility; the original never reads it (see --attack_train)")
    steps: int = inherited(pretraining.AttackConfig, "steps", 10)
    eps: float = inherited(pretraining.AttackConfig, "eps")
    alpha: float = inherited(pretraining.AttackConfig, "alpha", 2.0)
    trades_beta: float = flag(6.0, "weight of the robust term of trades and mart")
    eps_warmup_epochs: int = flag(
        0, "the radius grows linearly from 0 in epoch 0 to --eps in epoch N", "epochs", new=True
    )
    alpha_warmup_epochs: int = flag(
        0, "the step grows linearly from 0 in epoch 0 to --alpha in epoch N, as in ARES with 5", "epochs", new=True
    )
    alpha_schedule: str = flag(
        "constant",
        "the step after that: constant, or going to --alpha_end in the last epoch along a line or half a cosine",
        choices=ALPHA_SCHEDULES,
        new=True,
    )
    alpha_end: float = flag(0.0, "the step in the last epoch with --alpha_schedule linear or cosine", "1/255", new=True)


@dataclass(frozen=True)
class PenaltyConfig:
    """Mutual information beside the loss."""

    mi_loss: str = flag(
        "plain",
        "the information term, plain: none; dib_mi adds mi_xz I(images; features) - mi_yz I(logits; features)",
        choices=MI_LOSS,
        compat="means no information term",
    )
    mi_xz: float = flag(1e-4, "weight of the information between images and features", "loss per bit")
    mi_yz: float = flag(1e-3, "weight of the information between logits and features", "loss per bit")


@dataclass(frozen=True)
class OptimConfig(sections.OptimConfig):
    """Optimizer and schedule."""

    epochs: int = inherited(sections.OptimConfig, "epochs", 50)
    warmup_epochs: int = inherited(sections.OptimConfig, "warmup_epochs", 5)
    min_lr: float = inherited(sections.OptimConfig, "min_lr", 1e-6)
    layer_decay: float = flag(0.75, "each block's learning rate is this times that of the block above it")
    decay_tables: bool = flag(
        False, "weight decay of positional tables and tokens as well, as in ARES; vectors have none", new=True
    )
    clip_grad: float | None = flag(None, "largest L2 norm of the gradient; default: not clipped", type=float)
    model_ema: bool = flag(
        False, "keep a running average of the parameters, which is evaluated and saved beside them", new=True
    )
    model_ema_decay: float = flag(
        0.9998, "share of the average that stays at update n, at most (1 + n) / (10 + n)", "share, 0 to 1", new=True
    )


@dataclass(frozen=True)
class RunConfig(sections.RunConfig):
    """Outputs, resuming, device, seed."""

    output_dir: str = inherited(sections.RunConfig, "output_dir", "./output_dir")
    log_dir: str = inherited(sections.RunConfig, "log_dir", "./output_dir")


@dataclass(frozen=True)
class FinetuneConfig(Configuration):
    """Everything a fine-tuning run depends on."""

    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    augment: AugmentConfig = AugmentConfig()
    attack: AttackConfig = AttackConfig()
    penalty: PenaltyConfig = PenaltyConfig()
    optim: OptimConfig = OptimConfig()
    compute: ComputeConfig = ComputeConfig()
    validation: ValidationConfig = ValidationConfig()
    run: RunConfig = RunConfig()
    dist: DistConfig = DistConfig()

    def completed(self, explicit: set[str]) -> "FinetuneConfig":
        """A copy with the data set's side and classes where the flags were not set; classes None: as the folder has."""
        info = INFO.get(self.data.dataset)
        # An unknown data set is an error of its own, raised by `check`.
        if info is None:
            return self
        known = {"nb_classes": info.num_classes, "input_size": info.input_size or self.model.input_size}
        return self.updated({name: value for name, value in known.items() if name not in explicit})

    def check(self) -> "FinetuneConfig":
        """Return self if every value is possible; raises ValueError naming the flag, its value and what is allowed."""
        super().check()
        find(self.model.model, pretraining=False)
        flat = self.flat()
        check_shared(flat)
        _check_numbers(flat)
        validation_steps(flat["val_attack"])
        mixed = flat["mixup"] > 0 or flat["cutmix"] > 0 or flat["cutmix_minmax"] is not None
        if flat["attack_train"] == "mart" and (mixed or flat["warmup_aa"]):
            raise ValueError(
                "attack_train: mart needs one label per image; leave out --mixup, --cutmix and --warmup_aa"
            )
        if (mixed or flat["warmup_aa"]) and flat["mixup_mode"] == "pair" and flat["batch_size"] % 2:
            raise ValueError(f"batch_size: got {flat['batch_size']}, --mixup_mode pair needs an even number")
        if flat["val_list"] and flat["held_out"]:
            raise ValueError("val_list: best.pth is chosen by the listed images or by --held_out N, not by both")
        if flat["eval"] and flat["resume"] in ("", "auto"):
            raise ValueError("resume: --eval needs the file of the checkpoint to evaluate")
        return self

    def notes(self, explicit: set[str]) -> list[str]:
        notes: list[str] = []
        a, v = self.attack, self.validation
        if "attack" in explicit and a.attack != a.attack_train:
            notes.append(f"attack: fine-tuning does not read it; its attack is --attack_train {a.attack_train}")
        if a.attack_train == "apgd" and "alpha" in explicit:
            notes.append("alpha: apgd chooses its steps itself; the flag is not used")
        if a.attack_train in ("trades", "mart") and "smoothing" in explicit and self.augment.smoothing:
            notes.append(f"smoothing: {a.attack_train} has a loss of its own, without smoothing, as in the original")
        if self.penalty.mi_loss not in MI_LOSS:
            notes.append(f"mi_loss: {self.penalty.mi_loss!r} is not dib_mi: NO information term, as in the original")
        if (v.held_out or v.val_list) and v.val_attack == "none":
            images = "listed" if v.val_list else "held-out"
            notes.append(f"val_attack: none; best.pth is chosen by clean accuracy on the {images} images")
        flat = self.flat()
        if flat["layer_decay"] == 0:
            notes.append("layer_decay: 0: all layers but the last keep their values")
        unmoved = [] if v.eval else [*idle_attack(flat, a.attack_train != "plain"), *unreached(flat)]
        return notes + unmoved + without_effect(combinations.FINETUNING, flat, explicit)


def _check_numbers(flat: dict) -> None:
    for name in "drop_path layer_decay smoothing reprob mixup_prob mixup_switch_prob model_ema_decay".split():
        require(0 <= flat[name] <= 1, name, flat[name], "a share between 0 and 1")
    for name in "mixup cutmix trades_beta eps_warmup_epochs alpha_warmup_epochs test_every held_out".split():
        require(flat[name] >= 0, name, flat[name], "0 or more")
    for name in ("recount", "val_every"):
        require(flat[name] >= 1, name, flat[name], "1 or more")
    # Smaller values are fractions of 1 where 1/255 is meant.
    for name in ("alpha", "alpha_end"):
        require(flat[name] == 0 or flat[name] >= 0.05, name, flat[name], "a number in 1/255: 2, not 2/255 = 0.0078")
    require(flat["clip_grad"] is None or flat["clip_grad"] > 0, "clip_grad", flat["clip_grad"], "more than 0")
    classes, minmax = flat["nb_classes"], flat["cutmix_minmax"]
    require(classes is None or classes >= 1, "nb_classes", classes, "1 or more")
    two = minmax is None or (isinstance(minmax, tuple) and len(minmax) == 2 and 0 < minmax[0] < minmax[1] <= 1)
    require(two, "cutmix_minmax", minmax, "two rising shares between 0 and 1")
