"""ConViT: blocks that attend by content and by position, then ordinary ones with a class token."""

from typing import Any

from torch import Tensor, nn

from mimir_fast.config.choices import ORIGINAL
from mimir_fast.models.families.convit.attention import GatedAttention
from mimir_fast.models.families.convit.autoencoder import MaskedAutoencoderConViT
from mimir_fast.models.families.convit.classifier import ConViT
from mimir_fast.models.families.records import (
    PATCHES,
    TABLES,
    depth,
    different,
    layer_of,
    read_sizes,
    resize,
)
from mimir_fast.models.family import BESIDE, Family, Network, Tensors, TimmModel
from mimir_fast.models.layers import Attention, Block

# The original's; embed_dim is a head's.
SIZES: dict[str, dict[str, Any]] = {
    "convit_ti": {"embed_dim": 48, "depth": 12, "num_heads": 4},
    "convit_small": {"embed_dim": 48, "depth": 12, "num_heads": 9},
    "convit_base": {"embed_dim": 48, "depth": 12, "num_heads": 16},
}
DECODER = {"decoder_embed_dim": 128, "decoder_depth": 2, "decoder_num_heads": 16}
GATE = "blocks.0.attn.gating_param"
# Of every ConViT: its first block is local.
MARKS = (*TABLES, *PATCHES, GATE, "blocks.0.attn.pos_proj.weight", "blocks.0.attn.v.weight")
BIAS = "blocks.0.attn.v.bias"
# Which autoencoders have and the original's classifiers do without.
BIASES = ("blocks.*.attn.qk.bias", "blocks.*.attn.v.bias", "blocks.*.attn.qkv.bias")
TIMM = {"convit_ti": "convit_tiny", "convit_small": "convit_small", "convit_base": "convit_base"}


def read(tensors: Tensors) -> dict[str, Any]:
    """What `read_sizes` finds, with embed_dim of a head; num_heads, local_up_to_layer and qkv_bias where a gate is there."""
    found = read_sizes(tensors, class_rows=0)
    if GATE in tensors and "embed_dim" in found:
        heads = len(tensors[GATE])
        gates = sum(name.startswith("blocks.") and name.endswith(".gating_param") for name in tensors)
        found |= {"embed_dim": found["embed_dim"] // heads, "num_heads": heads}
        found |= {"local_up_to_layer": gates, "qkv_bias": BIAS in tensors}
    return found


def describe(read: dict[str, Any]) -> str:
    """Width, heads, depth and width of the MLP."""
    width = read["embed_dim"] * read["num_heads"]
    blocks = f"depth {read['depth']}, {read['local_up_to_layer']} of it local"
    return f"width {width}, {read['num_heads']} heads, {blocks}, MLP width {round(width * read['mlp_ratio'])}"


def adapt(classifier: ConViT, tensors: Tensors) -> None:
    """Biases of queries, keys and values, which autoencoders have; the original's classifiers leave them out."""
    if classifier.compat == ORIGINAL or BIAS not in tensors:
        return
    for module in classifier.modules():
        packed = [module.qk, module.v] if isinstance(module, GatedAttention) else []
        packed += [module.qkv] if isinstance(module, Attention) else []
        for linear in packed:
            # What is there stays: an optimizer may have it already.
            if linear.bias is None:
                linear.bias = nn.Parameter(_zeros(linear))


def _zeros(linear: nn.Linear) -> Tensor:
    return linear.weight.new_zeros(linear.out_features)


def timm(name: str, keywords: dict[str, Any]) -> TimmModel:
    """timm's model of the same sizes; as options what differs."""
    usual = {"img_size": 224, "patch_size": 16, "qkv_bias": False}
    options = {"num_classes": keywords.get("num_classes", 0), "global_pool": "token"}
    return TimmModel(TIMM[name], options | different(usual | keywords, usual), "patch_embed.proj", "head")


def network(name: str, keywords: dict[str, Any]) -> Network:
    """timm's ConVit, whose parameters have the same names."""
    local = {"local_up_to_layer": 10, "global_pool": "token"}
    return Network("from timm.models.convit import ConVit\n", "ConVit", keywords | local)


CONVIT = Family(
    name="convit",
    title="ConViT",
    autoencoder=MaskedAutoencoderConViT,
    classifier=ConViT,
    sizes=SIZES,
    decoder=DECODER,
    aliases={"mae_convit_tiny": "mae_convit_ti", "convit_tiny": "convit_ti"},
    suffixes=("_dec128d2b",),
    masking="patches",
    has_original=True,
    encoder=(*TABLES, "patch_embed.*", "blocks.*", "norm.*"),
    fresh=("head.*",),
    beside=(*BESIDE, *BIASES),
    adapt=adapt,
    undecayed=TABLES,
    # The local ones too, which are Blocks with another attention.
    blocks=(Block,),
    depth=depth,
    layer_of=layer_of,
    marks=MARKS,
    read=read,
    # qkv_bias: under one name autoencoders have them, and the original's classifiers do not (docs/fidelity.md, D4).
    free=("img_size", "patch_size", "num_classes", "global_pool", "qkv_bias"),
    describe=describe,
    tables=("pos_embed",),
    resize=resize,
    timm=timm,
    network=network,
)
