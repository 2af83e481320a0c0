"""Reader of checkpoints, ours and the original's, of other trainers' state dicts and of .safetensors."""

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from mimir_fast.checkpoints.errors import CheckpointError
from mimir_fast.checkpoints.fetch import is_url, local_file
from mimir_fast.checkpoints.formats import parsed
from mimir_fast.checkpoints.names import Channels, Named, find_weights, is_average


@dataclass(frozen=True)
class Contents:
    """The contents of a file.

    file     path or URL
    weights  entry -> parameters by bare name, the preferred entry first; the entry of a bare state dict is called ""
    entries  all other entries as they are: args, epoch, optimizer, ...; none in a bare state dict
    aside    what was not read: place -> name of its type
    """

    file: str
    weights: dict[str, Named]
    entries: dict[Any, Any]
    aside: dict[str, str]

    @property
    def entry(self) -> str:
        """The entry that `tensors` are from."""
        return next(iter(self.weights))

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The parameters to use for anything but resuming: the average, if the file has one."""
        return self.weights[self.entry].tensors

    @property
    def normalisation(self) -> tuple[Channels, Channels] | None:
        """Mean and std of the images in [0,1] that the model's own first layer normalises by; None: it has no such layer."""
        return self.weights[self.entry].normalisation

    @property
    def source(self) -> str:
        """Source of `tensors` for messages: the file, and the entry if it is an average."""
        return f"{self.file} ({self.entry})" if is_average(self.entry) else self.file

    @property
    def args(self) -> dict:
        """The flags of the run that wrote the file, empty where they are not known."""
        args = self.entries.get("args")
        args = vars(args) if isinstance(args, argparse.Namespace) else args
        return dict(args) if isinstance(args, dict) else {}

    @property
    def epoch(self) -> int | None:
        """The last finished epoch, where the file says it."""
        epoch = self.entries.get("epoch")
        return epoch if isinstance(epoch, int) else None

    @property
    def classes(self) -> list[str] | None:
        """Names of the classes in the order of the head, where the file says them."""
        own = self.entries.get("mimir_fast")
        names = own.get("classes") if isinstance(own, dict) else self.args.get("classes")
        return [str(name) for name in names] if isinstance(names, list) else None

    @property
    def state(self) -> dict:
        """The state to resume training from: all entries, under `model` the parameters themselves, under `model_ema` their
        average if there is one."""
        # The optimizer's moments belong to the parameters, not to their average.
        raw = next((name for name in self.weights if not is_average(name)), self.entry)
        named = {name: held.tensors for name, held in self.weights.items() if name}
        average = {"model_ema": self.tensors} if is_average(self.entry) and raw != self.entry else {}
        return {**self.entries, **named, **average, "model": self.weights[raw].tensors}

    @property
    def left_aside(self) -> list[str]:
        """A line to print about what was not read, if there is such."""
        if not self.aside:
            return []
        words = ", ".join(f"{place} ({name})" for place, name in list(self.aside.items())[:3])
        more = f" and {len(self.aside) - 3} more" if len(self.aside) > 3 else ""
        return [f"{self.file}: left aside what is neither tensor nor plain value: {words}{more}"]

    @property
    def notes(self) -> list[str]:
        """Lines to print: which of several weights were taken for anything but resuming, and what was not read."""
        lines = []
        if len(self.weights) > 1:
            average = ", an average," if is_average(self.entry) else ""
            lines.append(f"{self.file} holds parameters as {', '.join(self.weights)}: {self.entry}{average} is taken")
        return lines + self.left_aside


def read(source: str | Path, flag: str) -> Contents:
    """Read a file or https URL onto the CPU.

    flag   the flag that named it, which begins every message
    Raises CheckpointError, one line, if there is no such file, if it is something else than a checkpoint (with what it is, if
    that can be recognised), if it is damaged (checksums are verified), would run code, or holds no parameters.
    """
    source = str(source)
    path = local_file(source, flag)
    try:
        state, aside = parsed(path)
        if not isinstance(state, dict):
            raise CheckpointError(f"holds {type(state).__name__}, expected a dictionary with parameters")
        weights = find_weights(state)
        if not weights:
            raise CheckpointError(f"holds no 'model' entry and no parameters{_held(state)}")
        entries = {name: value for name, value in state.items() if not _absent(name, value, weights)}
    except CheckpointError as error:
        again = f"; remove {path} to fetch it again" if is_url(source) else ""
        raise CheckpointError(f"{flag}: {source} {error}{again}") from error.__cause__
    return Contents(source, weights, entries, aside)


def _absent(name: object, value: object, weights: dict[str, Named]) -> bool:
    """Whether an entry is a parameter, holds the parameters that `weights` has already, or nothing."""
    if value is None or isinstance(value, Tensor) or (isinstance(value, (dict, list, tuple)) and not value):
        return True
    return any(entry == name or entry.startswith(f"{name}.") for entry in weights)


def _held(state: dict) -> str:
    """What a file holds instead, for a message."""
    words = [str(name) for name in list(state)[:4]]
    return f"; it holds {', '.join(words)}{', ...' if len(state) > 4 else ''}" if words else ""
