"""Configuration of an evaluation: one frozen dataclass per section, each field one command-line flag."""

from dataclasses import dataclass

from mimir_fast.attacks.named import USUAL_EPS_L2, WORDS, parse_attacks
from mimir_fast.config.choices import EVAL_RESIZE, SPLITS, STEP_GRAPH
from mimir_fast.config.combinations import EVALUATION, without_effect
from mimir_fast.config.fields import Configuration, flag, require
from mimir_fast.data.datasets import DATASETS
from mimir_fast.models.families import find, listed

# Radius in 1/255 where neither flags nor the checkpoint name one.
USUAL_EPS = 8.0


@dataclass(frozen=True)
class ModelConfig:
    """What is evaluated."""

    checkpoint: str = flag(
        "", "file or https URL of a classifier: a checkpoint of ours or of the original, or a state dict", path=True
    )
    model: str | None = flag(None, f"{listed(pretraining=False)}; default: what the checkpoint says", type=str)
    use_normalize: bool | None = flag(
        None, "the model was trained on normalised images; default: what the checkpoint says, else not", type=bool
    )


@dataclass(frozen=True)
class DataConfig:
    """On which images."""

    dataset: str | None = flag(
        None, "data set; default: the one that the checkpoint was trained on", type=str, choices=DATASETS
    )
    data_root: str = flag("../data", "folder that holds the data set, or a cache of it (mimir-fast cache)", path=True)
    split: str = flag("val", "which images", choices=SPLITS)
    held_out: int = flag(0, "with --split held_out: training images that were held out", "images")
    num_images: int = flag(0, "look at N images chosen at random, the same ones whatever --seed; 0: all", "images")
    image_list: str = flag("", "file of paths below the split's folder, one a line, such as RobustBench's", path=True)
    eval_resize: str = flag(
        "crop",
        "crop: images of any size are resized and their centre is cropped; none: all have the input's size already",
        choices=EVAL_RESIZE,
    )
    num_workers: int = flag(0, "data-loading processes; 0 loads in the main process", "processes")


@dataclass(frozen=True)
class AttackConfig:
    """Under which attacks; pixels are in [0,1] and everything is in fp32."""

    attacks: str = flag("clean,fgsm,pgd-20", f"separated by commas: {WORDS}")
    eps: float | None = flag(
        None,
        "radius of the L-infinity ball; default: the one that the checkpoint was trained with, else 8",
        "1/255",
        type=float,
    )
    alpha: float | None = flag(
        None, "step size of pgd, cw, pgd-mi and pgd-feature; default: eps / 4", "1/255", type=float
    )
    eps_l2: float = flag(USUAL_EPS_L2, "radius of the L2 ball of pgd-l2 and aa-l2", "norm of a perturbation in [0,1]")
    alpha_l2: float | None = flag(None, "step size of pgd-l2; default: eps_l2 / 4", "as eps_l2", type=float)
    restarts: int = flag(1, "random starts of those attacks; all must fail")
    mi_weight: float = flag(1e-5, "weight of nHSIC in pgd-mi", "loss per unit of nHSIC")
    checks: bool = flag(
        False, "also attack 100 images at eps 127.5, which none can survive unless gradients are masked"
    )


@dataclass(frozen=True)
class RunConfig:
    """How."""

    batch_size: int = flag(64, "images at a time; changes nothing but time and memory, except for pgd-mi", "images")
    aa_batch: int = flag(
        64, "images that AutoAttack draws its random numbers for at once; part of its result", "images"
    )
    output_dir: str | None = flag(
        None,
        "folder of results.json and of the images' outcomes; default: eval/NAME beside the checkpoint",
        type=str,
        path=True,
    )
    device: str = flag("cuda", "cuda or cpu; without a CUDA device the default falls back to cpu and says so")
    seed: int = flag(0, "seed of the random starts and of AutoAttack")
    step_graph: str = flag(
        "auto",
        "launch an attack on a batch as one CUDA graph, captured with the second batch; auto: on CUDA wherever it can be",
        choices=STEP_GRAPH,
    )


@dataclass(frozen=True)
class EvaluateConfig(Configuration):
    """Everything an evaluation depends on."""

    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    attack: AttackConfig = AttackConfig()
    run: RunConfig = RunConfig()

    def check(self) -> "EvaluateConfig":
        """Return self if every value is possible; raises ValueError naming the flag, its value and what is allowed."""
        super().check()
        if self.model.model is not None:
            find(self.model.model, pretraining=False)
        require(
            bool(self.model.checkpoint), "checkpoint", "none", "a file or URL: --checkpoint runs/my/checkpoint-99.pth"
        )
        flat = self.flat()
        for name in ("batch_size", "aa_batch", "restarts"):
            require(flat[name] >= 1, name, flat[name], "1 or more")
        for name in ("num_images", "held_out", "num_workers", "seed", "mi_weight"):
            require(flat[name] >= 0, name, flat[name], "0 or more")
        require(self.run.device.split(":")[0] in ("cuda", "cpu"), "device", self.run.device, "cuda or cpu")
        eps, alpha = self.attack.eps, self.attack.alpha
        require(eps is None or 0.25 <= eps <= 255, "eps", eps, "0.25 to 255, in 1/255: 8, not 8/255 = 0.031")
        require(alpha is None or 0.02 <= alpha <= 255, "alpha", alpha, "0.02 to 255, in 1/255: 2, not 2/255 = 0.008")
        for name in ("eps_l2", "alpha_l2"):
            require(flat[name] is None or flat[name] > 0, name, flat[name], "more than 0: a norm of pixels in [0,1]")
        # For its errors: the names of the attacks.
        parse_attacks(self.attack.attacks, eps or USUAL_EPS, alpha or USUAL_EPS / 4)
        return self

    def notes(self, explicit: set[str]) -> list[str]:
        return without_effect(EVALUATION, self.flat(), explicit)


def _recipe(**values) -> EvaluateConfig:
    return EvaluateConfig().updated(values)


def cifar10() -> EvaluateConfig:
    """The original's evaluation on CIFAR-10 (eps 8, alpha 2)."""
    return _recipe(dataset="cifar10", attacks="clean,pgd-20,pgd-100,aa", eps=8.0, alpha=2.0)


def imagenet() -> EvaluateConfig:
    """The original's evaluation on ImageNet (eps 2, alpha 1)."""
    return _recipe(dataset="imagenet", attacks="clean,pgd-20,pgd-100,aa", eps=2.0, alpha=1.0)


def adaptive() -> EvaluateConfig:
    """The paper's adaptive attacks beside PGD."""
    return _recipe(attacks="clean,pgd-100,pgd-mi,pgd-feature")


RECIPES = {recipe.__name__: recipe for recipe in (cifar10, imagenet, adaptive)}
