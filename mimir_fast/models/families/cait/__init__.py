"""CaiT: deep trunks of talking heads over patches, and a class token that only reads them."""

from typing import Any

from mimir_fast.config.choices import ORIGINAL
from mimir_fast.models.families import records
from mimir_fast.models.families.cait.attention import ClassAttentionBlock, TalkingHeadsBlock
from mimir_fast.models.families.cait.autoencoder import MaskedAutoencoderCaiT
from mimir_fast.models.families.cait.classifier import CaiT
from mimir_fast.models.families.records import (
    PATCHES,
    TABLES,
    depth,
    different,
    read_sizes,
    resize,
)
from mimir_fast.models.family import Family, Network, Tensors, TimmModel

# The original's.
SIZES: dict[str, dict[str, Any]] = {
    "cait_xxs24": {"embed_dim": 192, "depth": 24, "num_heads": 4, "init_values": 1e-5},
    "cait_xxs36": {"embed_dim": 192, "depth": 36, "num_heads": 4, "init_values": 1e-5},
    "cait_s36": {"embed_dim": 384, "depth": 36, "num_heads": 8, "init_values": 1e-6},
    "cait_xxs24_mh": {"embed_dim": 192, "depth": 24, "num_heads": 12, "init_values": 1e-5},
    # Of this size the original has an autoencoder and no classifier.
    "cait_xxs24_12layer": {"embed_dim": 384, "depth": 12, "num_heads": 6, "init_values": 1e-5},
}
DECODER = {"decoder_embed_dim": 128, "decoder_depth": 2, "decoder_num_heads": 16}
HEADS, CLASS_FC1 = "blocks.0.attn.proj_l.weight", "blocks_token_only.0.mlp.fc1.weight"
# Of every CaiT: heads that talk, and layers of the class token.
MARKS = (*TABLES, *PATCHES, HEADS, "blocks.0.gamma_1", CLASS_FC1)
# The model of timm whose name is nearest, and that model's sizes.
XXS24 = {"img_size": 224, "embed_dim": 192, "depth": 24, "num_heads": 4}
TIMM = {
    "cait_xxs24": ("cait_xxs24_224", XXS24),
    "cait_xxs36": ("cait_xxs36_224", {**XXS24, "depth": 36}),
    "cait_s36": ("cait_s36_384", {"img_size": 384, "embed_dim": 384, "depth": 36, "num_heads": 8}),
    "cait_xxs24_mh": ("cait_xxs24_224", XXS24),
    "cait_xxs24_12layer": ("cait_xxs24_224", XXS24),
}


def layer_of(name: str, model: CaiT | MaskedAutoencoderCaiT) -> int:
    """As in other families; the class token's layers come after the trunk.

    To the original they are the trunk's first blocks, whose learning rate is next to nothing.
    """
    if name.startswith("blocks_token_only.") and model.compat == ORIGINAL:
        return int(name.split(".")[1]) + 1
    return records.layer_of(name, model)


def read(tensors: Tensors) -> dict[str, Any]:
    """What `read_sizes` finds; num_heads, depth_token_only, mlp_ratio_token_only where a CaiT's tensors are there."""
    found = read_sizes(tensors, class_rows=0)
    if HEADS in tensors and CLASS_FC1 in tensors and "embed_dim" in found:
        layers = {name.split(".")[1] for name in tensors if name.startswith("blocks_token_only.")}
        ratio = len(tensors[CLASS_FC1]) / found["embed_dim"]
        # Heads are told by the layers between them alone, [N,N]: the packed projection is [3D,D] whatever their number.
        found |= {"num_heads": len(tensors[HEADS]), "depth_token_only": len(layers), "mlp_ratio_token_only": ratio}
    return found


def describe(read: dict[str, Any]) -> str:
    """Width, heads, depth and width of the MLP."""
    width = read["embed_dim"]
    blocks = f"depth {read['depth']} + {read['depth_token_only']}"
    return f"width {width}, {read['num_heads']} heads, {blocks}, MLP width {round(width * read['mlp_ratio'])}"


def timm(name: str, keywords: dict[str, Any]) -> TimmModel:
    """The nearest name; as options what differs from what timm has under it."""
    theirs, sizes = TIMM[name]
    options = {"num_classes": keywords.get("num_classes", 0), "global_pool": "token", "img_size": keywords["img_size"]}
    usual = sizes | {"patch_size": 16}
    return TimmModel(theirs, options | different(usual | keywords, usual), "patch_embed.proj", "head")


def network(name: str, keywords: dict[str, Any]) -> Network:
    """timm's Cait, whose parameters have the same names."""
    return Network("from timm.models.cait import Cait\n", "Cait", keywords | {"global_pool": "token"})


CAIT = Family(
    name="cait",
    title="CaiT",
    autoencoder=MaskedAutoencoderCaiT,
    classifier=CaiT,
    sizes=SIZES,
    decoder=DECODER,
    suffixes=("_dec128d2b",),
    masking="patches",
    has_original=True,
    encoder=(*TABLES, "patch_embed.*", "blocks.*", "blocks_token_only.*", "norm.*"),
    fresh=("head.*",),
    undecayed=TABLES,
    blocks=(TalkingHeadsBlock, ClassAttentionBlock),
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
