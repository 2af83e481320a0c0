"""Configuration of an export: one frozen dataclass per section, each field one command-line flag."""

from dataclasses import dataclass
from pathlib import Path

from mimir_fast.config.fields import Configuration, flag, require
from mimir_fast.data.datasets import DATASETS
from mimir_fast.models.families import find

# The two files of each format.
SUFFIXES = {"timm": (".safetensors", ".json"), "robustbench": (".pt", ".py")}
FORMATS = tuple(SUFFIXES)


@dataclass(frozen=True)
class ModelConfig:
    """What is exported."""

    checkpoint: str = flag("", "file or https URL: a checkpoint of ours or of the original, or a state dict", path=True)
    model: str | None = flag(None, "model name; default: what the checkpoint says", type=str)
    dataset: str | None = flag(
        None, "data set of the training; default: what the checkpoint says", type=str, choices=DATASETS
    )
    use_normalize: bool | None = flag(
        None, "the model was trained on normalised images; default: what the checkpoint says, else not", type=bool
    )


@dataclass(frozen=True)
class OutputConfig:
    """Where to and how."""

    format: str = flag("timm", "what will read it", choices=FORMATS)
    output: str = flag(
        "", "file to write: .safetensors for timm, .pt for robustbench; .json or .py is put beside it", path=True
    )
    overwrite: bool = flag(False, "replace files that are there already")


@dataclass(frozen=True)
class ExportConfig(Configuration):
    """Everything an export depends on."""

    model: ModelConfig = ModelConfig()
    output: OutputConfig = OutputConfig()

    def check(self) -> "ExportConfig":
        """Return self if every value is possible; raises ValueError naming the flag, its value and what is allowed."""
        super().check()
        if self.model.model is not None:
            find(self.model.model, pretraining=None)
        require(bool(self.model.checkpoint), "checkpoint", "none", "a file or URL")
        suffix = SUFFIXES[self.output.format][0]
        path = Path(self.output.output)
        require(path.suffix == suffix, "output", repr(str(path)), f"FILE{suffix} with --format {self.output.format}")
        require(path.parent.is_dir(), "output", path, "a file in a folder that exists")
        there = [p for p in self.paths() if p.exists()]
        require(self.output.overwrite or not there, "output", "existing " + ", ".join(map(str, there)), "--overwrite")
        return self

    def paths(self) -> list[Path]:
        """The two files that are written."""
        return [Path(self.output.output).with_suffix(suffix) for suffix in SUFFIXES[self.output.format]]
