"""XCiT: attention among channels, local convolutions among patches, and a class token that only reads them."""

from typing import Any

from torch import Tensor

from mimir_fast.config.choices import ORIGINAL
from mimir_fast.models.families import records
from mimir_fast.models.families.records import depth, different
from mimir_fast.models.families.xcit.attention import ClassBlock, CrossCovarianceBlock
from mimir_fast.models.families.xcit.autoencoder import MaskedAutoencoderXCiT
from mimir_fast.models.families.xcit.classifier import XCiT
from mimir_fast.models.family import Family, Network, Resized, Tensors, TimmModel

# The original's.
SIZES: dict[str, dict[str, Any]] = {
    "xcit_small": {"embed_dim": 384, "depth": 12, "num_heads": 8},
    "xcit_medium": {"embed_dim": 512, "depth": 12, "num_heads": 8},
    "xcit_large": {"embed_dim": 768, "depth": 12, "num_heads": 16},
}
DECODER = {"decoder_embed_dim": 128, "decoder_depth": 2, "decoder_num_heads": 16}
STEM, PROJECTION = "patch_embed.proj.0.0.weight", "pos_embed.token_projection.weight"
HEADS, FC1 = "blocks.0.attn.temperature", "blocks.0.mlp.fc1.weight"
# Of every XCiT: a convolutional stem, temperatures of heads, local convolutions.
MARKS = ("cls_token", STEM, PROJECTION, HEADS, FC1, "blocks.0.local_mp.conv1.weight", "cls_attn_blocks.0.gamma1")
# What the original's layer decay decays, in spite of its list of names, or since no name is on it.
DECAYED = ("pos_embed.*", "blocks.*.attn.temperature")
# timm's model of the nearest size, and that model's sizes.
S12 = {"img_size": 224, "patch_size": 16, "embed_dim": 384, "depth": 12, "num_heads": 8, "tokens_norm": True}
TIMM = {
    "xcit_small": ("xcit_small_12_p16_224", S12),
    # timm has no medium or large of 12 blocks.
    "xcit_medium": ("xcit_medium_24_p16_224", {**S12, "embed_dim": 512, "depth": 24}),
    "xcit_large": ("xcit_large_24_p16_224", {**S12, "embed_dim": 768, "depth": 24, "num_heads": 16}),
}


def layer_of(name: str, model: XCiT | MaskedAutoencoderXCiT) -> int:
    """As in other families; positions come before the blocks.

    To the original they come last, at the head's learning rate.
    """
    if name.startswith("pos_embed."):
        return depth(model) + 1 if model.compat == ORIGINAL else 0
    return records.layer_of(name, model)


def read(tensors: Tensors) -> dict[str, Any]:
    """The constructors' sizes but img_size, tokens_norm and eta, which leave no trace, as far as the tensors are there."""
    found: dict[str, Any] = {"depth": _count(tensors, "blocks.")}
    if "cls_token" in tensors:
        found["embed_dim"] = tensors["cls_token"].shape[-1]
        if FC1 in tensors:
            found["mlp_ratio"] = len(tensors[FC1]) / found["embed_dim"]
    if HEADS in tensors:
        found |= {"num_heads": len(tensors[HEADS]), "cls_attn_layers": _count(tensors, "cls_attn_blocks.")}
    if STEM in tensors:
        # Every convolution of the stem halves the side; the GELUs between them have no tensors.
        steps = {name.split(".")[2] for name in tensors if name.startswith("patch_embed.proj.")}
        found["patch_size"] = 2 ** len(steps)
    if "head.weight" in tensors:
        found["num_classes"] = len(tensors["head.weight"])
    return found


def _count(tensors: Tensors, prefix: str) -> int:
    return len({name.split(".")[1] for name in tensors if name.startswith(prefix)})


def describe(read: dict[str, Any]) -> str:
    """Width, heads, depth and width of the MLP."""
    width = read["embed_dim"]
    blocks = f"depth {read['depth']} + {read['cls_attn_layers']}"
    return f"width {width}, {read['num_heads']} heads, {blocks}, MLP width {round(width * read['mlp_ratio'])}"


def resize(table: Tensor, shape: tuple[int, ...]) -> Resized:
    """Never asked for: positions are computed for the model's own grid."""
    raise ValueError("no positional table")


def timm(name: str, keywords: dict[str, Any]) -> TimmModel:
    """The nearest name; as options what differs from what timm has under it."""
    theirs, usual = TIMM[name]
    options = {"num_classes": keywords.get("num_classes", 0), "global_pool": "token", "img_size": keywords["img_size"]}
    return TimmModel(theirs, options | different(usual | keywords, usual), "patch_embed.proj.0.0", "head")


def network(name: str, keywords: dict[str, Any]) -> Network:
    """timm's Xcit, whose parameters have the same names."""
    return Network(
        "from timm.models.xcit import Xcit\n", "Xcit", keywords | {"tokens_norm": True, "global_pool": "token"}
    )


XCIT = Family(
    name="xcit",
    title="XCiT",
    autoencoder=MaskedAutoencoderXCiT,
    classifier=XCiT,
    sizes=SIZES,
    decoder=DECODER,
    suffixes=("_dec128d2b",),
    # The stem's convolutions reach across patches: they need a whole image.
    masking="images",
    has_original=True,
    encoder=("cls_token", "patch_embed.*", "pos_embed.*", "blocks.*", "cls_attn_blocks.*", "norm.*"),
    fresh=("head.*",),
    undecayed=("cls_token", *DECAYED),
    original_decays=DECAYED,
    blocks=(CrossCovarianceBlock, ClassBlock),
    trunk="blocks",
    depth=depth,
    layer_of=layer_of,
    marks=MARKS,
    read=read,
    describe=describe,
    tables=(),
    resize=resize,
    timm=timm,
    network=network,
)
