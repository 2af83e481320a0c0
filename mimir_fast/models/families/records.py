"""Parts of records that families share whose models have a class token, one positional table and a list `blocks`."""

import math
from typing import Any

from torch import Tensor

from mimir_fast.models.encoder import Encoder
from mimir_fast.models.family import Resized, Tensors
from mimir_fast.models.layers import resize_table

# Before the blocks, never decayed in fine-tuning.
TABLES = ("cls_token", "pos_embed")
PATCHES = ("patch_embed.proj.weight", "blocks.0.mlp.fc1.weight")


def depth(model: Encoder) -> int:
    """Number of blocks."""
    return len(model.blocks)


def layer_of(name: str, model: Encoder) -> int:
    """0 for what comes before the blocks, i + 1 for block i, depth + 1 for what comes after them."""
    if name in TABLES or name.startswith("patch_embed."):
        return 0
    if name.startswith("blocks."):
        return int(name.split(".")[1]) + 1
    return depth(model) + 1


def read_sizes(tensors: Tensors, class_rows: int) -> dict[str, Any]:
    """Width as embed_dim, depth, mlp_ratio, patch_size, img_size, num_classes, as far as the tensors are there.

    class_rows   rows of the positional table before those of the patches
    """
    found: dict[str, Any] = {"depth": len({name.split(".")[1] for name in tensors if name.startswith("blocks.")})}
    if "cls_token" in tensors:
        found["embed_dim"] = tensors["cls_token"].shape[-1]
        if "blocks.0.mlp.fc1.weight" in tensors:
            found["mlp_ratio"] = tensors["blocks.0.mlp.fc1.weight"].shape[0] / found["embed_dim"]
    if "patch_embed.proj.weight" in tensors:
        found["patch_size"] = tensors["patch_embed.proj.weight"].shape[-1]
        if "pos_embed" in tensors and (side := grid(tuple(tensors["pos_embed"].shape), class_rows)):
            found["img_size"] = found["patch_size"] * side
    if "head.weight" in tensors:
        found["num_classes"] = len(tensors["head.weight"])
    return found


def grid(shape: tuple[int, ...], class_rows: int) -> int:
    """Side of the square grid of a positional table [1,class_rows+L,D]; 0 for a table of another kind."""
    patches = shape[1] - class_rows if len(shape) == 3 else 0
    side = math.isqrt(max(patches, 0))
    return side if side**2 == patches else 0


def resize(table: Tensor, shape: tuple[int, ...]) -> Resized:
    """A table without class row, [1,L,D], for another grid: bicubic."""
    before, after = grid(tuple(table.shape), 0), grid(shape, 0)
    if not before or table.shape[2] != shape[2]:
        raise ValueError(f"[1,L,{shape[2]}], a square grid of L patches")
    return Resized(resize_table(table, before, after), grids_in_words(before, after))


def grids_in_words(before: int, after: int) -> str:
    """How a table was resized."""
    return f"from {before} x {before} to {after} x {after} patches"


def different(ours: dict[str, Any], theirs: dict[str, Any]) -> dict[str, Any]:
    """Of our keywords those for which timm's model of a name has another value."""
    return {key: ours[key] for key, value in theirs.items() if ours[key] != value}
