"""The Vision Transformer: fixed sine-cosine positions in pre-training, trained ones after it, one class token."""

from typing import Any

import torch
from torch import Tensor

from mimir_fast.models.families.records import (
    PATCHES,
    TABLES,
    depth,
    different,
    grid,
    grids_in_words,
    layer_of,
    read_sizes,
)
from mimir_fast.models.families.vit.autoencoder import MaskedAutoencoderViT
from mimir_fast.models.families.vit.classifier import VisionTransformer
from mimir_fast.models.family import Family, Network, Resized, Tensors, TimmModel
from mimir_fast.models.layers import Block, resize_table

SIZES: dict[str, dict[str, Any]] = {
    # Ours, for demonstrations on CPUs; the others are the original's.
    "vit_nano": {"embed_dim": 96, "depth": 4, "num_heads": 3},
    "vit_ti": {"embed_dim": 192, "depth": 12, "num_heads": 3},
    "vit_small": {"embed_dim": 384, "depth": 12, "num_heads": 6},
    "vit_small_ds": {"embed_dim": 768, "depth": 8, "num_heads": 8, "mlp_ratio": 3.0},
    "vit_base": {"embed_dim": 768, "depth": 12, "num_heads": 12},
    "vit_large": {"embed_dim": 1024, "depth": 24, "num_heads": 16},
}
DECODER = {"decoder_embed_dim": 128, "decoder_depth": 2, "decoder_num_heads": 16}
# Of every ViT: the patch projection is a convolution, attention has one packed projection, the MLP two layers
MARKS = (*TABLES, *PATCHES, "blocks.0.attn.qkv.weight")
# The model of timm whose name is nearest, and that model's sizes.
TIMM = {
    "vit_nano": ("vit_tiny_patch16_224", {"depth": 12, "embed_dim": 192, "num_heads": 3}),
    "vit_ti": ("vit_tiny_patch16_224", {"depth": 12, "embed_dim": 192, "num_heads": 3}),
    "vit_small": ("vit_small_patch16_224", {"depth": 12, "embed_dim": 384, "num_heads": 6}),
    "vit_small_ds": ("vit_base_patch16_224", {"depth": 12, "embed_dim": 768, "num_heads": 12}),
    "vit_base": ("vit_base_patch16_224", {"depth": 12, "embed_dim": 768, "num_heads": 12}),
    "vit_large": ("vit_large_patch16_224", {"depth": 24, "embed_dim": 1024, "num_heads": 16}),
}


def read(tensors: Tensors) -> dict[str, Any]:
    """What `read_sizes` finds; with a head global_pool too."""
    found = read_sizes(tensors, class_rows=1)
    # The two kinds of pooling differ in where the last normalisation stands.
    return found | ({"global_pool": "fc_norm.weight" in tensors} if "head.weight" in tensors else {})


def describe(read: dict[str, Any]) -> str:
    """Width, depth and width of the MLP."""
    width, ratio = read["embed_dim"], read["mlp_ratio"]
    return f"width {width}, depth {read['depth']}, MLP width {round(width * ratio)}"


def resize(table: Tensor, shape: tuple[int, ...]) -> Resized:
    """Bicubic; the class row stays as it is."""
    before, after = grid(tuple(table.shape), 1), grid(shape, 1)
    if not before or table.shape[2] != shape[2]:
        raise ValueError(f"[1,1+L,{shape[2]}], a class row and a square grid of L patches")
    return Resized(resize_positions(table, after), grids_in_words(before, after))


def resize_positions(table: Tensor, side: int) -> Tensor:
    """Positional table [1,1+L,D], L a square number -> [1,1+side*side,D]: the class row as it is, the rest bicubic."""
    old = grid(tuple(table.shape), 1)
    if old == side:
        return table
    return torch.cat([table[:, :1], resize_table(table[:, 1:], old, side)], dim=1)


def timm(name: str, keywords: dict[str, Any]) -> TimmModel:
    """The nearest name; as options what differs from what timm has under it."""
    theirs, sizes = TIMM[name]
    theirs_all = {"img_size": 224, "patch_size": 16, "depth": sizes["depth"], "mlp_ratio": 4.0, **sizes}
    ours = {"mlp_ratio": 4.0, **keywords}
    options = {"num_classes": ours.get("num_classes", 0), "global_pool": "avg" if ours.get("global_pool") else "token"}
    # Only what differs from timm's model of this name: for vit_nano depth and width, for most others nothing.
    options |= different(ours, theirs_all)
    return TimmModel(theirs, options, "patch_embed.proj", "head")


def network(name: str, keywords: dict[str, Any]) -> Network:
    """timm's VisionTransformer, whose parameters have the same names."""
    source = "from timm.models.vision_transformer import VisionTransformer\n"
    pooling = {"global_pool": "avg" if keywords["global_pool"] else "token"}
    return Network(source, "VisionTransformer", keywords | pooling)


VIT = Family(
    name="vit",
    title="ViT",
    autoencoder=MaskedAutoencoderViT,
    classifier=VisionTransformer,
    sizes=SIZES,
    decoder=DECODER,
    # Of the original's names.  Patches are 16 pixels wide unless patch_size says otherwise.
    suffixes=("_dec128d2b", "_patch16"),
    masking="patches",
    encoder=(*TABLES, "patch_embed.*", "blocks.*", "norm.*"),
    # With global_pool the last normalisation is fc_norm, which no autoencoder has.
    fresh=("norm.*", "fc_norm.*", "head.*"),
    undecayed=TABLES,
    blocks=(Block,),
    trunk="blocks",
    depth=depth,
    layer_of=layer_of,
    marks=MARKS,
    read=read,
    describe=describe,
    tables=("pos_embed",),
    resize=resize,
    timm=timm,
    network=network,
)
