"""Reader of checkpoints, ours and the original's, of bare state dicts and .safetensors.

Only tensors, plain values and argparse.Namespace are read; no code in a file is ever run.
"""

import argparse
import errno
import json
import pickle
import re
import zipfile
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mimir_fast.checkpoints.errors import CheckpointError
from mimir_fast.checkpoints.fetch import is_url, local_file

# Entries that may hold parameters, the preferred one first: an average before the parameters that it averages.
AVERAGED = ("model_ema",)
RAW = ("model", "model_state_dict", "state_dict")
# Key of the metadata in a .safetensors of ours that holds, as JSON, the args that tensors cannot tell.
METADATA = "mimir_fast"
# Prefixes that DDP, other wrappers and torch.compile put before the names of parameters.
PREFIXES = ("module.", "base_model.", "_orig_mod.")
# First bytes of files that are often found under a checkpoint's name.
LFS_POINTER, HTML_PAGE = b"version https://git-lfs", re.compile(rb"\s*<(!doctype\s+html|html)", re.IGNORECASE)


@dataclass(frozen=True)
class Contents:
    """The contents of a file.

    file     path or URL
    weights  entry -> parameters by bare name, the preferred entry first; the entry of a bare state dict is called ""
    entries  all other entries as they are: args, epoch, optimizer, ...; none in a bare state dict
    """

    file: str
    weights: dict[str, dict[str, Tensor]]
    entries: dict

    @property
    def entry(self) -> str:
        """The entry that `tensors` are from."""
        return next(iter(self.weights))

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The parameters to use for anything but resuming: the average, if the file has one."""
        return self.weights[self.entry]

    @property
    def source(self) -> str:
        """Source of `tensors` for messages: the file, and the entry if it is an average."""
        return f"{self.file} ({self.entry})" if self.entry in AVERAGED else self.file

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
    def state(self) -> dict:
        """The state to resume training from: all entries, and under `model` the parameters themselves, not their average."""
        raw = next((name for name in self.weights if name not in AVERAGED), self.entry)
        named = {name: tensors for name, tensors in self.weights.items() if name}
        return {**self.entries, **named, "model": self.weights[raw]}


def read(source: str | Path, flag: str) -> Contents:
    """Read a file or https URL onto the CPU.

    flag   the flag that named it, which begins every message
    Raises CheckpointError, one line, if there is no such file, if it is something else than a checkpoint (with what it is, if
    that can be recognised), if it is damaged, would run code, or holds no parameters.
    """
    source = str(source)
    path = local_file(source, flag)
    try:
        state = _parsed(path)
        if not isinstance(state, dict):
            raise CheckpointError(f"holds {type(state).__name__}, expected a dictionary with parameters")
        weights = {name: bare for name in (*AVERAGED, *RAW) if (bare := _bare(state.get(name)))}
        entries = {name: value for name, value in state.items() if name not in weights}
        if not weights:
            weights, entries = {"": _bare(state)}, {}
        if not any(weights.values()):
            raise CheckpointError("holds no 'model' entry and no parameters")
    except CheckpointError as error:
        again = f"; remove {path} to fetch it again" if is_url(source) else ""
        raise CheckpointError(f"{flag}: {source} {error}{again}") from error.__cause__
    return Contents(source, weights, entries)


def _parsed(path: Path) -> object:
    """The object in a file; of a .safetensors its parameters and args as a checkpoint holds them.

    Raises CheckpointError that says what the file is, without naming it.
    """
    try:
        with open(path, "rb") as file:
            head = file.read(512)
            if other := _other_kind(head, path):
                raise CheckpointError(other)
            # A .safetensors begins with 8 bytes for the length of a JSON object, then the object.
            if head[8:9] == b"{":
                return _safetensors(path)
            file.seek(0)
            # The open file and not its name, by whose suffix torch.load would choose the format.
            with torch.serialization.safe_globals([argparse.Namespace]):
                return torch.load(file, map_location="cpu", weights_only=True)
    except (CheckpointError, MemoryError):
        raise
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL ([\w.]+)", str(error))
        why = f"it holds {found[1]}" if found else "it is damaged, or no checkpoint, or holds something else"
        raise CheckpointError(f"is refused: {why}; only tensors and plain values are read") from error
    except OSError as error:
        # torch's reader seeks before the beginning of an archive that was cut off
        if error.errno == errno.EINVAL:
            raise CheckpointError("is damaged or no checkpoint") from error
        raise CheckpointError(f"cannot be read ({error})") from error
    # Bytes that are no pickle make torch's reader fail with any exception, KeyError and IndexError among them.
    except Exception as error:
        raise CheckpointError(f"is damaged or no checkpoint{_reason(error)}") from error


def _other_kind(head: bytes, path: Path) -> str | None:
    """What a file is, if it is a known kind that holds no parameters; head: its first bytes."""
    if not head:
        return "is empty"
    if head.startswith(LFS_POINTER):
        return "is a Git LFS pointer, not the file it stands for; `git lfs pull` fetches that"
    if HTML_PAGE.match(head):
        return "is an HTML page, no checkpoint"
    if not zipfile.is_zipfile(path):
        return None
    with zipfile.ZipFile(path) as archive:
        names = {name.rsplit("/", 1)[-1] for name in archive.namelist()}
    if "constants.pkl" in names:
        return "is a TorchScript archive; save the state_dict of its module instead"
    return None if "data.pkl" in names else "is a zip archive, but no checkpoint"


def _safetensors(path: Path) -> dict:
    with safe_open(path, "pt") as file:
        args = json.loads((file.metadata() or {}).get(METADATA, "{}"))
        return {"state_dict": {name: file.get_tensor(name) for name in file.keys()}, "args": args}  # noqa: SIM118


def _reason(error: Exception) -> str:
    """The first sentence of a library's error, in brackets, if the error is about the file."""
    # Without the advice that follows, which names functions of the library, and without control codes.
    if not isinstance(error, (RuntimeError, ValueError, SafetensorError)):
        return ""
    lines = str(error).strip().splitlines()
    sentence = "".join(filter(str.isprintable, lines[0].split(". ")[0])) if lines else ""
    return f" ({sentence})" if sentence else ""


def _bare(tensors: object) -> dict[str, Tensor]:
    """Parameters by name, without the prefixes of wrappers; entries that are no tensors are left out."""
    bare: dict[str, Tensor] = {}
    for name, tensor in tensors.items() if isinstance(tensors, dict) else ():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            continue
        while prefix := next((p for p in PREFIXES if name.startswith(p)), None):
            name = name.removeprefix(prefix)
        bare[name] = tensor
    return bare
