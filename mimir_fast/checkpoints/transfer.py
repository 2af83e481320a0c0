"""From a pre-trained encoder to the start of a classifier.  Shapes: L patches, D width."""

import math
from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mimir_fast.checkpoints.errors import CheckpointError
from mimir_fast.checkpoints.matching import Match, compare
from mimir_fast.models import CLASSIFIERS, VisionTransformer

FRESH = ("norm.", "fc_norm.", "head.")  # what a classifier may start without


def load_pretrained(
    model: VisionTransformer, given: dict[str, Tensor], source: str, say: Callable[[str], None], head_std: float
) -> None:
    """Start a classifier from a checkpoint of ours or of the original, of pre-training or of a classifier.

    given        the checkpoint's parameters; source: its name in messages
    say          gets a table of what was loaded, what is missing and what is not used
    head_std     the head always starts afresh: truncated normal with this deviation, bias zero
    A positional table of another grid is resized (bicubic, the class row is kept).
    Raises CheckpointError if the encoder is not all there, has other sizes, or its positions are no square grid.
    """
    match = match_encoder(model, given, source)
    table = match.tensors["pos_embed"]
    resized = resize_positions(table, math.isqrt(model.num_patches))
    model.load_state_dict(match.tensors | {"pos_embed": resized}, strict=False)
    nn.init.trunc_normal_(model.head.weight, std=head_std)
    nn.init.zeros_(model.head.bias)
    say(f"finetune: {source}: {len(match.tensors)} of {len(model.state_dict())} tensors loaded")
    say(f"  {'loaded':<11}{len(match.tensors):>4}  {_summary(match.tensors)}")
    say(f"  {'missing':<11}{len(match.missing):>4}  {_summary(match.missing)} (start afresh)")
    say(f"  {'unexpected':<11}{len(match.unexpected):>4}  {_summary(match.unexpected)} (not used)")
    if resized is not table:
        before, after = (math.isqrt(t.shape[1] - 1) for t in (table, resized))
        say(f"  positional table resized from {before} x {before} to {after} x {after} patches")


def match_encoder(model: VisionTransformer, given: dict, source: str) -> Match:
    """Compare a checkpoint's parameters with the model's; see `load_pretrained` for the errors.

    The head is never taken over: it is missing, and unexpected where the checkpoint has one.  Positions of another grid are
    among the tensors as they are.
    """
    match = compare(model, {key: tensor for key, tensor in given.items() if not key.startswith("head.")})
    if not match.tensors and not match.misshapen:
        raise CheckpointError(
            f"finetune: {source} shares no parameter with the model (it holds {_summary(given)}); "
            "it must come from a ViT, pre-trained or fine-tuned"
        )
    _check_sizes(model, given, source)
    lacking = [key for key in match.missing if not key.startswith(FRESH)]
    misshapen = {key: shapes for key, shapes in match.misshapen.items() if key != "pos_embed"}
    needed = Match({}, lacking, [], misshapen)
    if needed.differs:
        raise CheckpointError(f"finetune: {source} is no whole ViT encoder: {needed.report()}")
    _check_grid(given["pos_embed"], source)
    tensors = {**match.tensors, "pos_embed": given["pos_embed"]}
    return match._replace(tensors=tensors, unexpected=[key for key in given if key not in tensors], misshapen={})


def resize_positions(table: Tensor, grid: int) -> Tensor:
    """Positional table [1,1+L,D], L a square number -> [1,1+grid*grid,D]: the class row as it is, the rest bicubic."""
    old = math.isqrt(table.shape[1] - 1)
    if old == grid:
        return table
    patches = table[:, 1:].float().unflatten(1, (old, old)).permute(0, 3, 1, 2)
    patches = F.interpolate(patches, size=(grid, grid), mode="bicubic", align_corners=False)
    return torch.cat([table[:, :1], patches.flatten(2).transpose(1, 2).to(table.dtype)], dim=1)


def _check_sizes(model: VisionTransformer, given: dict, source: str) -> None:
    theirs, ours = _sizes(given), _sizes(model.state_dict())
    if all(theirs) and theirs[:3] != ours[:3]:
        raise CheckpointError(f"finetune: {source} holds {_describe(theirs)}, --model is {_describe(ours)}")
    if all(theirs) and theirs[3] != ours[3]:
        raise CheckpointError(f"finetune: {source} has patches of side {theirs[3]}, --patch_size is {ours[3]}")


def _sizes(state: dict) -> tuple[int, int, int, int]:
    """Width, depth, hidden width of the MLP and patch side of a ViT's state dict; 0 for what it does not tell."""
    depth = len({key.split(".")[1] for key in state if key.startswith("blocks.")})
    keys = (("cls_token", -1), ("blocks.0.mlp.fc1.weight", 0), ("patch_embed.proj.weight", -1))
    width, hidden, patch = (state[key].shape[axis] if key in state else 0 for key, axis in keys)
    return width, depth, hidden, patch


def _describe(sizes: tuple[int, int, int, int]) -> str:
    width, depth, hidden, _ = sizes
    for name, known in CLASSIFIERS.items():
        if (known["embed_dim"], known["depth"]) == (width, depth) and hidden == known.get("mlp_ratio", 4) * width:
            return f"{name} (width {width}, depth {depth})"
    return f"a ViT of width {width}, depth {depth}, MLP width {hidden}"


def _check_grid(table: Tensor, source: str) -> None:
    rows = table.shape[1] if table.ndim == 3 else 0
    if rows < 2 or math.isqrt(rows - 1) ** 2 != rows - 1:
        raise CheckpointError(
            f"finetune: the positional table of {source} has shape {tuple(table.shape)}: expected [1,1+L,D], "
            "a class row and a square grid of L patches"
        )


def _summary(keys: Iterable[str]) -> str:
    """Keys by their first word, with counts: 'cls_token, blocks.* (24)'; the first few of them."""
    groups: dict[str, int] = {}
    for key in keys:
        word = "decoder_*" if key.startswith("decoder_") else key.split(".")[0] + (".*" if "." in key else "")
        groups[word] = groups.get(word, 0) + 1
    words = [f"{word} ({count})" if word.endswith("*") else word for word, count in groups.items()]
    return ", ".join(words[:8] + (["..."] if len(words) > 8 else [])) or "none"
