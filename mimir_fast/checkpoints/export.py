"""A trained model as a file for other programs.

timm: .safetensors that `timm.create_model(..., checkpoint_path=FILE)` loads; the call stands in the file's metadata and, with
everything timm calls a pretrained_cfg, in a .json beside it.  robustbench: a .pt and a .py that needs torch and timm only.
"""

import json
import runpy
from collections.abc import Iterator
from contextlib import contextmanager
from operator import attrgetter
from pathlib import Path
from typing import NamedTuple

import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import save
from torch import Tensor, nn

from mimir_fast.checkpoints.atomic import in_place_when_done
from mimir_fast.checkpoints.formats import CHECKSUM, METADATA
from mimir_fast.checkpoints.hashing import tensors_hash
from mimir_fast.checkpoints.robustbench import model_file
from mimir_fast.checkpoints.trained_models import (
    Trained,
    constructor_keywords,
    latent_tokens,
    load_classifier,
    load_encoder,
    training_eps,
)
from mimir_fast.config.export import ExportConfig
from mimir_fast.data.crops import evaluated_share
from mimir_fast.data.datasets import INFO
from mimir_fast.models import Classifier
from mimir_fast.models.families import family_of
from mimir_fast.models.family import PREFIX, matches
from mimir_fast.models.features import FeatureModel

# What timm prepares images by: without it the call would take them from the name's own configuration.
OVERLAY = ("input_size", "mean", "std", "interpolation", "crop_pct")
# Of the largest output: rounding is below 1e-5, a wrong architecture far above.
TOLERANCE = 1e-3


class Architecture(NamedTuple):
    """A timm model: its name, what timm.create_model is told beside it, classes of timm's among it, and its pretrained_cfg."""

    name: str
    options: dict
    pretrained_cfg: dict
    classes: dict[str, str] = {}  # noqa: RUF012 (nobody changes it)

    def create(self, path: Path) -> nn.Module:
        """The model that timm makes of the file."""
        classes = {name: attrgetter(place)(timm) for name, place in self.classes.items()}
        return timm.create_model(self.name, checkpoint_path=str(path), **self.options, **classes)

    def call(self, path: Path) -> str:
        """The line of Python that loads it."""
        overlay = {name: self.pretrained_cfg[name] for name in OVERLAY}
        words = {"checkpoint_path": str(path), **self.options, "pretrained_cfg_overlay": overlay}
        said = [f"{name}={value!r}" for name, value in words.items()]
        said += [f"{name}=timm.{place}" for name, place in self.classes.items()]
        return f"timm.create_model({self.name!r}, {', '.join(said)})"


def export(config: ExportConfig) -> int:
    """Load, write, report; raises ValueError for wrong input."""
    overrides = {name: getattr(config.model, name) for name in ("model", "dataset", "use_normalize")}
    load, write = (
        (load_encoder, export_timm) if config.output.format == "timm" else (load_classifier, export_robustbench)
    )
    trained = load(config.model.checkpoint, overrides=overrides)
    for line in [*trained.notes, *write(trained, *config.paths())]:
        print(line)
    return 0


@contextmanager
def refused_by_disk(path: Path) -> Iterator[None]:
    """Libraries' errors while writing as an OSError that names the file."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        raise OSError(f"output: could not write {path}: {error}") from error


def architecture(trained: Trained) -> Architecture:
    """How timm calls a model of ours; an encoder of pre-training has no classes and gives its class token."""
    args, family = trained.args, family_of(trained.model)
    theirs = family.timm(args["model"].removeprefix(PREFIX), constructor_keywords(trained))
    # The usual evaluation: data sets of any image size are resized to 256 for 224, small images are taken whole.
    cropped = args["dataset"] in INFO and INFO[args["dataset"]].side is None
    cfg = {
        "input_size": (3, args["input_size"], args["input_size"]),
        "mean": args["mean"] or (0.0, 0.0, 0.0),
        "std": args["std"] or (1.0, 1.0, 1.0),
        "interpolation": "bicubic",
        "crop_pct": evaluated_share(args["input_size"]) if cropped else 1.0,
        "num_classes": theirs.options["num_classes"],
        "first_conv": theirs.first_conv,
        "classifier": theirs.head,
    }
    return Architecture(theirs.name, theirs.options, cfg, theirs.classes)


def timm_tensors(trained: Trained) -> dict[str, Tensor]:
    """The parameters under timm's names; of a masked autoencoder the encoder's alone."""
    family, tensors = family_of(trained.model), trained.model.state_dict()
    if not isinstance(trained.model, Classifier):
        tensors = family.of_classifier(tensors)
        tensors = {name: tensor for name, tensor in tensors.items() if matches(name, family.encoder)}
    return {key: tensor for name, tensor in tensors.items() if (key := family.timm_key(name)) is not None}


def export_timm(trained: Trained, path: Path, json_path: Path) -> list[str]:
    """Write both files, once timm has loaded them and gives the same outputs; returns lines to print.

    Of a masked autoencoder the encoder alone is written.  Raises ValueError if timm gives other outputs.
    """
    built, tensors = architecture(trained), timm_tensors(trained)
    config = {
        "architecture": built.name,
        "num_classes": built.options["num_classes"],
        "global_pool": built.options["global_pool"],
        "model_args": {k: v for k, v in built.options.items() if k not in ("num_classes", "global_pool")},
        "pretrained_cfg": built.pretrained_cfg,
        "create_model": built.call(path),
        "source": {"file": trained.source, "epoch": trained.epoch, "model": trained.args["model"]},
    }
    metadata = {"format": "pt", "create_model": config["create_model"], "config": json.dumps(config)}
    metadata |= {METADATA: json.dumps(training(trained)), CHECKSUM: tensors_hash(tensors)}
    with in_place_when_done(path, json_path, keep_suffix=True) as (written, written_json):
        with refused_by_disk(path):
            # Not save_file, which has temporary files of its own, with random names that stay after a kill.
            written.write_bytes(save({name: tensor.contiguous() for name, tensor in tensors.items()}, metadata))
            written_json.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        difference = checked(trained, PixelModel(built.create(written), built.pretrained_cfg), path)
    return [f"wrote {path} and {json_path}; outputs differ by at most {difference:.0e}", config["create_model"]]


def training(trained: Trained) -> dict:
    """What `trained` cannot tell from tensors when the file is given to mimir_fast again."""
    facts = {"dataset": trained.args["dataset"], "use_normalize": trained.args["mean"] is not None}
    if trained.args["mean"] is not None:
        facts |= {name: list(trained.args[name]) for name in ("mean", "std")}
    if trained.classes is not None:
        facts["classes"] = trained.classes
    eps = training_eps(trained)
    return facts if eps is None else {**facts, "eps": eps / 255}


def export_robustbench(trained: Trained, path: Path, python_path: Path) -> list[str]:
    """Write both files, once loading them as a user would gives the same outputs; see export_timm."""
    with in_place_when_done(path, python_path, keep_suffix=True) as (written, written_python):
        with refused_by_disk(path):
            torch.save({"state_dict": trained.model.state_dict(), "args": training(trained)}, written)
            written_python.write_text(model_file(trained, path), encoding="utf-8")
        difference = checked(trained, runpy.run_path(str(written_python))["load"](written), path)
    return [f"wrote {path} and {python_path}; logits differ by at most {difference:.0e}"]


class PixelModel(nn.Module):
    """A timm model behind the normalisation of its pretrained_cfg: logits, or all tokens where it has no classes."""

    def __init__(self, model: nn.Module, cfg: dict):
        super().__init__()
        self.model, self.cfg = model.eval(), cfg

    def forward(self, images: Tensor) -> Tensor:
        mean, std = (images.new_tensor(self.cfg[name])[:, None, None] for name in ("mean", "std"))
        images = (images - mean) / std
        if self.cfg["num_classes"]:
            return self.model(images)
        assert isinstance(self.model, FeatureModel)
        # Some models leave their tokens on a grid, with the features last.
        return self.model.forward_features(images).flatten(1, -2)


@torch.no_grad()
def checked(trained: Trained, exported: nn.Module, path: Path) -> float:
    """Largest difference of outputs on two random images, relative to the largest output.  Raises ValueError if it matters."""
    size = trained.args["input_size"]
    # Two images, so that a mistake in the batch dimension shows; noise, so that no pixel is like its neighbour.
    images = torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    ours = trained.model(images) if isinstance(trained.model, Classifier) else latent_tokens(trained, images)
    difference = ((exported(images) - ours).abs().max() / ours.abs().max().clamp_min(1e-12)).item()
    # Not >=: a NaN compares false, and must be refused too.
    if not difference < TOLERANCE:
        raise ValueError(
            f"output: {path} would give other outputs in timm {timm.__version__} than here (by {difference:.1e}); not written"
        )
    return difference
