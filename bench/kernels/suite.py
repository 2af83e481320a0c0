"""All cases asked for, the most important first."""

import importlib
from collections import namedtuple
from dataclasses import dataclass

from mimir_fast.config.pretraining import PretrainConfig
from mimir_fast.config.pretraining_recipes import cifar10_vit_s, imagenet_vit_b, imagenet_vit_s
from mimir_fast.models.families import find
from tests.support.cases import DTYPES, Case

# by what is at stake in a step; tests/test_layout.py holds the list to the folders of kernels/
OPS: tuple[str, ...] = (
    *("mlp", "short_attention", "add_layer_norm", "nhsic", "linf_patch_step", "masked_patch_loss", "linf_start"),
    *("crop_resize_yuv420", "crop_resize", "patch_gather", "token_restore", "mask_indices"),
)


# B images of `side` pixels in patches of p; of L patches K are kept and M removed, each has P numbers; D, N width and heads of
# the encoder, E, R of the decoder
Size = namedtuple("Size", "B side p L K M P D N E R")


def size_of(config: PretrainConfig, **changes) -> Size:
    """The size of one micro-batch of a run."""
    flat = config.updated(changes).flat()
    side, p, wide = flat["input_size"], flat["patch_size"], find(flat["model"], pretraining=True)[1]
    L = (side // p) ** 2
    K = int(L * (1 - flat["mask_ratio"]))
    encoder, decoder = ((wide["embed_dim"], wide["num_heads"]), (wide["decoder_embed_dim"], wide["decoder_num_heads"]))
    return Size(flat["batch_size"], side, p, L, K, L - K, 3 * p**2, *encoder, *decoder)


SIZES: dict[str, Size] = {  # the most important first
    "imagenet_vit_b": size_of(imagenet_vit_b()),
    "imagenet_vit_s": size_of(imagenet_vit_s()),
    "cifar10_vit_s": size_of(cifar10_vit_s()),
    "imagenet_vit_l": size_of(imagenet_vit_s(), model="mae_vit_large"),
    "small": size_of(cifar10_vit_s(), model="mae_vit_ti", patch_size=4, batch_size=8),  # for CPUs
}
ON_GPU, ON_CPU = (list(SIZES)[:-1], list(DTYPES)), (["small"], ["fp32"])  # recipes and dtypes by default


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
