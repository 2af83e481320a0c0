"""What files of a Swin say about its sizes, and tables of relative positions for other windows."""

import math
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from mimir_fast.models.family import Resized, Tensors

TABLE = "layers.0.blocks.0.attn.relative_position_bias_table"
FC1 = "layers.0.blocks.0.mlp.fc1.weight"
PROJECTION = "patch_embed.proj.weight"
# Of every Swin: patches are normalised, the first block has a table of relative positions.
MARKS = (PROJECTION, "patch_embed.norm.weight", TABLE, FC1, "norm.weight")


def read(tensors: Tensors) -> dict[str, Any]:
    """Keywords of the constructors, as far as the tensors are there; img_size follows from a decoder's positions or from masks
    of windows."""
    found: dict[str, Any] = {}
    if "head.weight" in tensors:
        found["num_classes"] = len(tensors["head.weight"])
    if "decoder_pred.weight" in tensors:
        found["decoder_embed_dim"] = tensors["decoder_pred.weight"].shape[1]
        found["decoder_depth"] = len({name.split(".")[1] for name in tensors if name.startswith("decoder_blocks.")})
    if any(name not in tensors for name in MARKS):
        return found
    # Of "layers.S.blocks.B. ...": S and B.
    blocks = {
        tuple(map(int, name.split(".")[1:4:2])) for name in tensors if name.startswith("layers.") and ".blocks." in name
    }
    depths = tuple(sum(layer == stage for layer, _ in blocks) for stage in range(1 + max(layer for layer, _ in blocks)))
    # A table has a column per head; the packed projection is [3D,D] whatever their number.
    heads = tuple(tensors[TABLE.replace("layers.0", f"layers.{stage}")].shape[1] for stage in range(len(depths)))
    width, patch = tensors[PROJECTION].shape[0], tensors[PROJECTION].shape[-1]
    found |= {"embed_dim": width, "depths": depths, "num_heads": heads, "patch_size": patch}
    found |= {"window_size": _window(tensors[TABLE].shape[0]), "mlp_ratio": tensors[FC1].shape[0] / width}
    found["qkv_bias"] = "layers.0.blocks.0.attn.qkv.bias" in tensors
    side = _side(tensors, patch, 2 ** (len(depths) - 1), found["window_size"])
    return found | ({"img_size": side} if side else {})


def _window(entries: int) -> int:
    """Side of a window from the entries of its table, (2w-1)^2."""
    return (math.isqrt(entries) + 1) // 2


def _side(tensors: Tensors, patch: int, n: int, window: int) -> int:
    """Side of the images; 0 where the tensors do not say.  n: side of a unit in tokens."""
    if "decoder_pos_embed" in tensors:
        return patch * n * math.isqrt(tensors["decoder_pos_embed"].shape[1])
    # Every second block moves its windows: block 1 is the first with a mask, [windows,w*w,w*w].
    if (mask := tensors.get("layers.0.blocks.1.attn_mask")) is None:
        return 0
    tiles = math.isqrt(len(mask))
    # Windows may stick out: their number leaves w sides, of which units divide one or several.
    sides = [side for side in range(window * (tiles - 1) + 1, window * tiles + 1) if side % n == 0]
    return patch * sides[0] if len(sides) == 1 else 0


def describe(read: dict[str, Any]) -> str:
    """Width of the first stage, depths, heads and window."""
    depths, heads = ("-".join(map(str, read[key])) for key in ("depths", "num_heads"))
    return f"width {read['embed_dim']}, depths {depths}, heads {heads}, windows of {read['window_size']}"


def resize(table: Tensor, shape: tuple[int, ...]) -> Resized:
    """A table [(2w-1)^2,N] for another window: bicubic over rows and columns that tokens are apart."""
    old, side = math.isqrt(len(table)), math.isqrt(shape[0])
    if table.ndim != 2 or old**2 != len(table) or table.shape[1] != shape[1]:
        raise ValueError(f"[(2w-1)^2,{shape[1]}], the relative positions within a window of side w")
    entries = table.float().T.unflatten(1, (old, old))[None]
    entries = F.interpolate(entries, size=(side, side), mode="bicubic", align_corners=False)
    resized = entries[0].flatten(1).T.contiguous().to(table.dtype)
    return Resized(resized, f"from windows of {_window(len(table))} to windows of {_window(shape[0])}")
