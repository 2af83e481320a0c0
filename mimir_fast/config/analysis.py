"""Configuration of an analysis: one frozen dataclass per section, each field one command-line flag."""

from dataclasses import dataclass

from mimir_fast.analyze.estimates import GROUPS
from mimir_fast.config.choices import BANDWIDTHS, SPLITS
from mimir_fast.config.combinations import HELD_OUT, without_effect
from mimir_fast.config.evaluation import DataConfig as EvaluationData
from mimir_fast.config.fields import Configuration, flag, inherited, require
from mimir_fast.data.datasets import DATASETS
from mimir_fast.models.families import find


@dataclass(frozen=True)
class ModelConfig:
    """What is analyzed."""

    checkpoint: tuple[str, ...] = flag(
        (),
        "checkpoints of pre-training or fine-tuning, and folders of runs, of which every checkpoint-*.pth is taken",
        type=str,
        several=True,
        path=True,
    )
    model: str | None = flag(None, "model name; default: what the checkpoint says", type=str)
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
    eval_resize: str = inherited(EvaluationData, "eval_resize")
    num_images: int = flag(512, "size of the random slice, all images where there are fewer; held in memory", "images")


@dataclass(frozen=True)
class AttackConfig:
    """The perturbation: PGD against reconstruction, or for a classifier against its cross-entropy."""

    eps: float | None = flag(
        None, "radius of the L-infinity ball; default: that of the checkpoint's training, else 8", "1/255", type=float
    )
    alpha: float | None = flag(
        None, "step size; default: eps / 4, for a pre-training checkpoint 1.25 eps", "1/255", type=float
    )
    steps: int | None = flag(None, "attack steps; default: 20, for a pre-training checkpoint 1", "steps", type=int)


@dataclass(frozen=True)
class RunConfig:
    """How."""

    bandwidth: str = flag(
        "squared",
        "kernel width of the matrix entropies: the mean squared distance, or with distance the training's rule, the mean "
        "distance, with which images saturate the estimates",
        choices=BANDWIDTHS,
    )
    batch_size: int = flag(64, "images at a time; changes nothing but time and memory", "images")
    output_dir: str | None = flag(
        None,
        "folder of analysis.json, .svg and .png; default: analysis/NAME beside a checkpoint, or analysis in the folder",
        type=str,
        path=True,
    )
    device: str = flag("cuda", "cuda or cpu; without a CUDA device the default falls back to cpu and says so")
    seed: int = flag(0, "seed of the slice, of the attack's random draws and of the groups behind the intervals")


@dataclass(frozen=True)
class AnalyzeConfig(Configuration):
    """Everything an analysis depends on."""

    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    attack: AttackConfig = AttackConfig()
    run: RunConfig = RunConfig()

    def check(self) -> "AnalyzeConfig":
        """Return self if every value is possible; raises ValueError naming the flag, its value and what is allowed."""
        super().check()
        if self.model.model is not None:
            find(self.model.model, pretraining=None)
        require(bool(self.model.checkpoint), "checkpoint", "none", "a file or a run's folder")
        require(self.data.num_images >= 2 * GROUPS, "num_images", self.data.num_images, f"{2 * GROUPS} or more")
        require(self.run.batch_size >= 1, "batch_size", self.run.batch_size, "1 or more")
        for name in ("held_out", "seed"):
            require(self.flat()[name] >= 0, name, self.flat()[name], "0 or more")
        require(self.run.device.split(":")[0] in ("cuda", "cpu"), "device", self.run.device, "cuda or cpu")
        eps, alpha, steps = self.attack.eps, self.attack.alpha, self.attack.steps
        require(eps is None or 0.25 <= eps <= 255, "eps", eps, "0.25 to 255, in 1/255: 8, not 8/255 = 0.031")
        require(alpha is None or 0.02 <= alpha <= 512, "alpha", alpha, "0.02 to 512, in 1/255: 2, not 2/255 = 0.008")
        require(steps is None or steps >= 1, "steps", steps, "1 or more")
        return self

    def notes(self, explicit: set[str]) -> list[str]:
        return without_effect((HELD_OUT,), self.flat(), explicit)
