"""Parameters from files, whoever wrote them: our checkpoints and the original's, bare state dicts, .safetensors."""

import argparse
import json
import pickle
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mimir_fast.checkpoints.errors import CheckpointError
from mimir_fast.checkpoints.sources import local_file

ENTRIES = ("model_ema", "model", "model_state_dict", "state_dict")  # where tensors may be; the first found is taken
METADATA = "mimir_fast"  # where a .safetensors of ours holds the args that its tensors do not say, as JSON
PREFIXES = ("module.", "base_model.", "_orig_mod.")


class Contents(NamedTuple):
    """What a file holds: parameters by bare name, the run's args, its last finished epoch, and where all that is from."""

    tensors: dict[str, Tensor]
    args: dict
    epoch: int | None
    source: str


def read_model_file(source: str, flag: str = "checkpoint") -> Contents:
    """Tensors without wrappers' prefixes, args as a dict, epoch; `flag` asked for it.

    Raises CheckpointError if the file cannot be used.
    """
    path = local_file(source, flag)
    if path.suffix == ".safetensors":
        return _read_safetensors(path, source, flag)
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            state = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CheckpointError(
            f"{flag}: {source} is damaged, no checkpoint, or holds more than tensors and plain values ({reason})"
        ) from error
    if not isinstance(state, dict):
        raise CheckpointError(f"{flag}: {source} holds {type(state).__name__}, expected a dictionary")
    entry = next((name for name in ENTRIES if isinstance(state.get(name), dict)), None)
    tensors = state if entry is None else state[entry]
    args, epoch = (state.get(name) if entry else None for name in ("args", "epoch"))
    args = vars(args) if isinstance(args, argparse.Namespace) else args
    suffix = " (model_ema)" if entry == "model_ema" else ""
    return Contents(
        _bare(tensors),
        dict(args) if isinstance(args, dict) else {},
        epoch if isinstance(epoch, int) else None,
        source + suffix,
    )


def _read_safetensors(path: Path, source: str, flag: str) -> Contents:
    try:
        with safe_open(path, "pt") as file:
            args = json.loads((file.metadata() or {}).get(METADATA, "{}"))
            return Contents(_bare({name: file.get_tensor(name) for name in file.keys()}), args, None, source)  # noqa: SIM118
    except (OSError, ValueError, SafetensorError) as error:
        raise CheckpointError(f"{flag}: {source} is damaged ({error})") from error


def _bare(tensors: dict) -> dict[str, Tensor]:
    """Names without the prefixes that wrappers put before them; entries that are no tensors are left out."""
    bare = {}
    for name, tensor in tensors.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            continue
        while prefix := next((p for p in PREFIXES if name.startswith(p)), None):
            name = name.removeprefix(prefix)
        bare[name] = tensor
    return bare
