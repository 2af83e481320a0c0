"""All cases asked for, the most important first."""

import importlib
from dataclasses import dataclass

from bench.kernels.case import DTYPES, Case
from bench.kernels.sizes import SIZES

# by what is at stake in a step; tests/test_layout.py holds the list to the folders of kernels/
OPS = (
    "mlp",
    "short_attention",
    "add_layer_norm",
    "nhsic",
    "linf_patch_step",
    "masked_patch_loss",
    "linf_start",
    "patch_gather",
    "token_restore",
    "mask_indices",
)


@dataclass(frozen=True)
class Entry:
    """A case, and the recipes that have it."""

    case: Case
    recipes: tuple[str, ...]

    def names(self) -> dict:
        """What a record calls it: the first recipe with the part of the model, and all recipes."""
        return {"recipe": f"{self.recipes[0]} {self.case.part}".strip(), "recipes": self.recipes}


def entries(ops: list[str], recipes: list[str], dtypes: list[str]) -> list[Entry]:
    """Cases in their usual dtypes first, in the order of the recipes, then by operation; equal shapes once.

    Raises ValueError naming a word that is not known.
    """
    for name, words, allowed in (("op", ops, OPS), ("recipes", recipes, SIZES), ("dtypes", dtypes, DTYPES)):
        unknown = [word for word in words if word not in allowed]
        if unknown or not words:
            raise ValueError(f"{name}: expected some of {', '.join(allowed)}; got {', '.join(unknown) or 'nothing'}")
    found: dict[str, Entry] = {}
    for recipe in recipes:
        for dtype in dtypes:
            for op in sorted(ops, key=OPS.index):
                for case in importlib.import_module(f"bench.kernels.bench_{op}").cases(SIZES[recipe], dtype):
                    before = found.get(case.label, Entry(case, ()))
                    found[case.label] = Entry(case, (*before.recipes, *({recipe} - {*before.recipes})))
    first = {recipe: number for number, recipe in enumerate(recipes)}
    return sorted(
        found.values(), key=lambda e: (e.case.dtype != e.case.usual, first[e.recipes[0]], OPS.index(e.case.op))
    )
