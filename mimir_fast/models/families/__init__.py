"""The families of models, and which of them a name, a model or a file belongs to."""

import difflib
from collections.abc import Sequence
from typing import Any

from torch import nn

from mimir_fast.models.compat import checked
from mimir_fast.models.families.cait import CAIT
from mimir_fast.models.families.convit import CONVIT
from mimir_fast.models.families.swin import SWIN
from mimir_fast.models.families.vit import VIT
from mimir_fast.models.families.xcit import XCIT
from mimir_fast.models.family import PREFIX, Family, Tensors

# Sizes in other programs' names, and in ours.
OTHER_WORDS = {"tiny": "ti", "s": "small", "b": "base", "l": "large"}
# A file is asked about from the last to the first: a family whose files would pass for another's stands behind it.
FAMILIES: tuple[Family, ...] = (VIT, CONVIT, CAIT, SWIN, XCIT)


def model_names(pretraining: bool | None) -> list[str]:
    """Names of the masked autoencoders, or of the classifiers; None: of both."""
    kinds = (True, False) if pretraining is None else (pretraining,)
    return [name for kind in kinds for family in FAMILIES for name in family.names(kind)]


def listed(pretraining: bool) -> str:
    """The same for a help text: mae_vit_{nano,ti,small}, one word per family."""
    words = []
    for family in FAMILIES:
        prefix = f"{PREFIX * pretraining}{family.name}_"
        words.append(f"{prefix}{{{','.join(name.removeprefix(prefix) for name in family.names(pretraining))}}}")
    return ", ".join(words)


def find(name: str, pretraining: bool | None) -> tuple[Family, dict[str, Any]]:
    """The family of a masked autoencoder or classifier (None: of either), and the keywords of its constructor.

    Raises ValueError for an unknown name.
    """
    kinds = (True, False) if pretraining is None else (pretraining,)
    for family in FAMILIES:
        bare = family.bare(name)
        if any(bare in family.names(kind) for kind in kinds):
            return family, family.keywords(bare)
    names = model_names(pretraining)
    near = nearest(name, names)
    meant = f"; did you mean {near}?" if near else ""
    raise ValueError(f"model: unknown name {name!r}; choose one of {', '.join(names)}{meant}")


def nearest(name: str, names: Sequence[str]) -> str | None:
    """The model of ours that another program's name stands for, if one does: timm's, MAE's, DeiT's."""
    words = name.lower().replace("-", "_").replace("deit", "vit")
    words = words.removeprefix(PREFIX) if not any(own.startswith(PREFIX) for own in names) else words
    for theirs, ours in OTHER_WORDS.items():
        words = "_".join(ours if word == theirs else word for word in words.split("_"))
    # What follows the size in others' names: patches, pixels, decoders, data.
    kept = [own for own in names if words == own or words.startswith(f"{own}_")]
    return max(kept, key=len) if kept else next(iter(difflib.get_close_matches(words, names, 1, 0.7)), None)


def construction(name: str, pretraining: bool, compat: str | None) -> tuple[Family, dict[str, Any]]:
    """As `find`, with the keyword `compat` where the family has it; `name` may also be a family's, whose constructor then has
    all sizes from its caller or by default.

    Raises ValueError for an unknown name or another compat than None and "original".
    """
    checked(compat)
    whole = next((family for family in FAMILIES if family.name == name), None)
    family, keywords = (whole, {}) if whole else find(name, pretraining)
    return family, keywords | ({"compat": compat} if family.has_original else {})


def family_of(model: nn.Module) -> Family:
    """The family of a model, its subclasses included.  Raises ValueError for a foreign one."""
    # A subclass of a family's model belongs to the family too.
    for kind in type(model).__mro__:
        for family in FAMILIES:
            if kind in (family.autoencoder, family.classifier):
                return family
    known = ", ".join(kind.__name__ for family in FAMILIES for kind in (family.autoencoder, family.classifier))
    raise ValueError(f"model: {type(model).__name__} is none of {known}")


def recognise(tensors: Tensors) -> Family:
    """The family of a file's tensors.  Raises ValueError that says what each family misses in them."""
    lacking = {family: family.lacks(family.of_classifier(tensors)) for family in FAMILIES}
    for family in reversed(FAMILIES):
        if lacking[family] is None:
            return family
    raise ValueError("; ".join(f"no {family.title} of mimir_fast: no {name}" for family, name in lacking.items()))
