"""Swin: attention within windows, stages of ever fewer and wider tokens, masks of units of 32 pixels for the whole batch."""

from typing import Any

from mimir_fast.models.families.swin.autoencoder import MaskedAutoencoderSwin
from mimir_fast.models.families.swin.classifier import SwinTransformer
from mimir_fast.models.families.swin.exports import BY_SIZE, network, timm, timm_key
from mimir_fast.models.families.swin.files import MARKS, describe, read, resize
from mimir_fast.models.families.swin.layers import SwinBlock
from mimir_fast.models.family import Family
from mimir_fast.models.layers import Block

TINY, SMALL, BASE, LARGE = (BY_SIZE[size] for size in ("tiny", "small", "base", "large"))
# The decoder that two of the original's models are pre-trained with; the others have DECODER.
WIDE_DECODER = {"decoder_embed_dim": 512, "decoder_depth": 1, "decoder_num_heads": 16}
SIZES: dict[str, dict[str, Any]] = {
    "swin_tiny": {**TINY, "window_size": 7, "patch_size": 4},
    # The original's is 768 wide, which cannot run.
    "swin_small": {**SMALL, "window_size": 7, "patch_size": 4},
    "swin_base": {**BASE, "window_size": 7, "patch_size": 4},
    "swin_base_win14": {**BASE, "window_size": 14, "patch_size": 4},
    "swin_base_win14_dec512b1": {**BASE, "window_size": 14, "patch_size": 4, **WIDE_DECODER},
    # Window 14, as in the original, whatever its configuration is called.
    "swin_large": {**LARGE, "window_size": 14, "patch_size": 4},
    "swin_large_dec512b1": {**LARGE, "window_size": 14, "patch_size": 4, **WIDE_DECODER},
    "swin_large_win7": {**LARGE, "window_size": 7, "patch_size": 4},
}
DECODER = {"decoder_embed_dim": 128, "decoder_depth": 2, "decoder_num_heads": 16}
ALIASES = {
    # Their decoder is 128 wide, in spite of the name.
    **{f"green_mim_swin_{size}_patch4_dec512b1": f"mae_swin_{size}" for size in ("tiny", "small", "base")},
    "green_mim_swin_base_patch4_win14_dec512b1": "mae_swin_base_win14_dec512b1",
    "green_mim_swin_base_patch4_win14_dec128d2": "mae_swin_base_win14",
    "green_mim_swin_large_patch4_win14_dec512b1": "mae_swin_large_dec512b1",
    "green_mim_swin_large_patch4_win14_dec128d2": "mae_swin_large",
    # timm's.
    **{f"swin_{size}_patch4_window7_224": f"swin_{size}" for size in ("tiny", "small", "base")},
    "swin_base_patch4_window14_224": "swin_base_win14",
    "swin_large_patch4_window14_224": "swin_large",
    "swin_large_patch4_window7_224": "swin_large_win7",
}
TABLES = "layers.*.blocks.*.attn.relative_position_bias_table"
# Constants, which follow from the sizes.
BUFFERS = ("layers.*.attn_mask", "layers.*.relative_position_index")


def depth(model: SwinTransformer) -> int:
    """Number of blocks, over all stages."""
    return sum(len(stage.blocks) for stage in model.stages)


def layer_of(name: str, model: SwinTransformer) -> int:
    """0 for the patches, n + 1 for block n counted over the stages; a merging is with the block before it."""
    if name.startswith("patch_embed."):
        return 0
    if not name.startswith("layers."):
        return depth(model) + 1
    stage, rest = int(name.split(".")[1]), name.split(".")[2:]
    before = sum(len(other.blocks) for other in model.stages[:stage])
    return before + (int(rest[1]) + 1 if rest[0] == "blocks" else len(model.stages[stage].blocks))


SWIN = Family(
    name="swin",
    title="Swin",
    autoencoder=MaskedAutoencoderSwin,
    classifier=SwinTransformer,
    sizes=SIZES,
    decoder=DECODER,
    aliases=ALIASES,
    # A token's convolution has a stride of its own width: none sees pixels of two units.
    masking="patches",
    has_original=True,
    # Left in place by the original's finetune.py, which so loads none of an encoder's tensors (docs/fidelity.md, D9).
    encoder_prefix="encoder.",
    encoder=("patch_embed.*", "layers.*", "norm.*"),
    fresh=("head.*", *BUFFERS),
    # As in Liu et al.'s code.  ARES decays them (--decay_tables): nothing there reads the model's list of names.
    undecayed=(TABLES,),
    blocks=(SwinBlock, Block),
    depth=depth,
    layer_of=layer_of,
    marks=MARKS,
    read=read,
    free=("img_size", "num_classes", "global_pool", "qkv_bias"),
    # Tables of relative positions are resized, so that a classifier may have other windows than its pre-training.
    adjusted=("window_size",),
    describe=describe,
    tables=(TABLES,),
    resize=resize,
    timm=timm,
    timm_key=timm_key,
    network=network,
)
