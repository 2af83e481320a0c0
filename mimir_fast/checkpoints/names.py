"""Names in files of other trainers: which entries hold parameters, which of them are averages, and what stands before names."""

import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from torch import Tensor

# Parts of names that wrappers add, wherever they stand: DDP, RobustBench, torch.compile, FSDP, activation checkpointing.
MARKS = frozenset(
    ("module", "base_model", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_fpw_module")
)
# Words that say that an entry or a prefix holds an average of the parameters.
AVERAGE = re.compile(
    r"(?:^|[._])(?:ema|swa|avg|average|averaged|averages|polyak|shadow|teacher)(?=$|[._])", re.IGNORECASE
)
# Entries that hold parameters, the preferred one first; an unknown one is taken where it is the only one.
ENTRIES = ("model", "model_state_dict", "state_dict", "model_state", "net", "network", "params", "module", "student")
# Entries of dictionaries inside of those, as {"ema": {"state_dict": ...}}.
INNER = ("state_dict", "model", "model_state_dict", "module", "params", "shadow")
# Numbers that averages and normalisations of other trainers keep beside the parameters.
COUNTERS = frozenset(("n_averaged", "num_updates", "decay", "initted", "step"))
MEANS, DEVIATIONS = (
    ("mean", "_mean", "mu", "pixel_mean", "image_mean"),
    ("std", "_std", "sigma", "pixel_std", "image_std"),
)
CHANNELS = 3
# First parts of the names of what stands beside an encoder and not in it.
HEADS = frozenset(("head", "heads", "fc", "classifier", "projector", "projection_head", "predictor"))

Channels = tuple[float, ...]


class Named(NamedTuple):
    """Parameters by bare name.

    normalisation   mean and std per channel, where the model normalises its images itself
    """

    tensors: dict[str, Tensor]
    normalisation: tuple[Channels, Channels] | None = None


def is_average(entry: str) -> bool:
    """Whether the name of an entry says that it holds an average."""
    return AVERAGE.search(entry) is not None


def find_weights(state: Mapping[Any, Any]) -> dict[str, Named]:
    """The entries of a file that hold parameters, averages first, each by its name; that of a bare state dict is called ""."""
    found = {entry: held for entry, value in state.items() if isinstance(entry, str) and (held := _inner(value))}
    known = [name for name in ENTRIES if name in found]
    # model_ema, as this package calls it, before averages of other names.
    averages = sorted((name for name in found if is_average(name)), key=lambda name: name != "model_ema")
    others = [name for name in found if name not in known and name not in averages]
    bare = _tensors(state)
    if not known and len(others) == 1 and not bare:
        known = others
    chosen = {name: found[name] for name in (*averages, *known)} or {"": bare}
    parted = [(entry, part) for name, tensors in chosen.items() for entry, part in _parted(name, tensors).items()]
    parted.sort(key=lambda entry: not is_average(entry[0]))
    return {entry: named for entry, tensors in parted if (named := _bare(tensors)).tensors}


def _tensors(value: Any) -> dict[str, Tensor]:
    """The entries of a dictionary that are parameters, without wrappers' marks in their names."""
    entries = value.items() if isinstance(value, Mapping) else ()
    kept = {name: tensor for name, tensor in entries if isinstance(name, str) and isinstance(tensor, Tensor)}
    unmarked = {".".join(part for part in name.split(".") if part not in MARKS): kept[name] for name in kept}
    return {name: tensor for name, tensor in unmarked.items() if name and not _counts(name, tensor)}


def _inner(value: Any) -> dict[str, Tensor]:
    """The parameters that an entry holds, itself or one dictionary further in; empty if there are none."""
    if not isinstance(value, Mapping):
        return {}
    return _tensors(value) or next((held for name in INNER if (held := _tensors(value.get(name)))), {})


def _counts(name: str, tensor: Tensor) -> bool:
    """Whether a tensor is a counter: no parameter is a single integer, and no buffer but batch normalisation's."""
    last = name.rsplit(".", 1)[-1]
    if last == "num_batches_tracked":
        return False
    return tensor.dim() == 0 and (last in COUNTERS or not (tensor.is_floating_point() or tensor.is_complex()))


def _parted(entry: str, tensors: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """An entry as it is, or where parameters and their average lie in it under two prefixes, each of the two."""
    parts: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        first, _, rest = name.partition(".")
        parts.setdefault(first, {})[rest] = tensor
    for average in filter(is_average, parts):
        for raw, held in parts.items():
            if raw != average and held.keys() == parts[average].keys() and "" not in held:
                return {f"{entry}.{name}".strip("."): parts[name] for name in (average, raw)}
    return {entry: tensors}


def _bare(tensors: dict[str, Tensor]) -> Named:
    """Parameters without the prefix that all of them share, and without the normalisation in front of them."""
    beside = {name: tensor for name, tensor in tensors.items() if _of_channels(name, tensor)}
    rest = {name: tensor for name, tensor in tensors.items() if name not in beside}
    values = [_channels(beside, words) for words in (MEANS, DEVIATIONS)]
    if len(beside) != 2 or values[0] is None or values[1] is None or not rest:
        return Named(_without(tensors, _shared_prefix(tensors)))
    # Some models take pixels from 0 to 255.
    scale = 255.0 if max(values[0]) > 1 else 1.0
    mean, std = (tuple(value / scale for value in channels) for channels in values if channels is not None)
    return Named(_without(rest, _shared_prefix(rest)), (mean, std))


def _of_channels(name: str, tensor: Tensor) -> bool:
    """Whether a tensor is a mean or deviation of the channels."""
    return name.rsplit(".", 1)[-1] in (*MEANS, *DEVIATIONS) and tensor.numel() == CHANNELS


def _channels(beside: dict[str, Tensor], words: tuple[str, ...]) -> Channels | None:
    found = [tensor for name, tensor in beside.items() if name.rsplit(".", 1)[-1] in words]
    return tuple(found[0].double().flatten().tolist()) if len(found) == 1 else None


def _shared_prefix(names: Iterable[str]) -> str:
    """The longest beginning, made of whole parts, that all names but those of heads share and none consists of."""
    split = [name.split(".")[:-1] for name in names if name.split(".")[0] not in HEADS]
    shared = []
    for parts in zip(*split):
        if len(set(parts)) > 1:
            break
        shared.append(parts[0])
    return "".join(f"{part}." for part in shared)


def _without(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
