"""Swin in other programs: timm's model, and a class that RobustBench loads strictly."""

from typing import Any

from mimir_fast.models.families.records import different
from mimir_fast.models.family import Network, TimmModel

# timm's sizes by name.
BY_SIZE: dict[str, dict[str, Any]] = {
    "tiny": {"embed_dim": 96, "depths": (2, 2, 6, 2), "num_heads": (3, 6, 12, 24)},
    "small": {"embed_dim": 96, "depths": (2, 2, 18, 2), "num_heads": (3, 6, 12, 24)},
    "base": {"embed_dim": 128, "depths": (2, 2, 18, 2), "num_heads": (4, 8, 16, 32)},
    "large": {"embed_dim": 192, "depths": (2, 2, 18, 2), "num_heads": (6, 12, 24, 48)},
}
# timm's model for files with the original's names, those in front of which RobustBench puts another among them.
SOURCE = """from functools import partial

from timm.models.swin_transformer import SwinTransformer
"""
CLASS = '''

def original_names(module, state, prefix, *_):
    """The original's names of a state dict's tensors -> timm's, in place; constants are timm's own."""
    own = {key[len(prefix):]: state.pop(key) for key in [key for key in state if key.startswith(prefix)]}
    for name, tensor in own.items():
        stage = name.split(".")[1] if ".downsample." in name else ""
        if not name.endswith(("attn_mask", "relative_position_index")):
            name = name.replace(f"layers.{stage}.", f"layers.{int(stage) + 1}.") if stage else name
            state[prefix + (f"head.fc.{name[5:]}" if name.startswith("head.") else name)] = tensor


class Swin(SwinTransformer):
    """timm's Swin, which is given its parameters under the original's names."""

    def __init__(self, **sizes):
        super().__init__(norm_layer=partial(nn.LayerNorm, eps=1e-6), **sizes)
        self.register_load_state_dict_pre_hook(original_names)
'''


def timm(name: str, keywords: dict[str, Any]) -> TimmModel:
    """timm's model of the nearest name; as options what differs."""
    size = name.split("_")[1]
    theirs = {
        **BY_SIZE[size],
        "img_size": 224,
        "patch_size": 4,
        "window_size": 7,
        "mlp_ratio": 4.0,
        "qkv_bias": True,
    }
    options = {"num_classes": keywords.get("num_classes", 0), "global_pool": "avg"} | different(
        theirs | keywords, theirs
    )
    # The default there is torch's, with an eps of 1e-5.
    norm = {"norm_layer": "layers.LayerNorm"}
    return TimmModel(f"swin_{size}_patch4_window7_224", options, "patch_embed.proj", "head.fc", norm)


def timm_key(name: str) -> str | None:
    """timm merges tokens at the beginning of a stage, has its head one level deeper, and stores no constants."""
    if name.endswith(("attn_mask", "relative_position_index")):
        return None
    if name.startswith("head."):
        return name.replace("head.", "head.fc.")
    stage, _, rest = name.removeprefix("layers.").partition(".")
    return f"layers.{int(stage) + 1}.{rest}" if rest.startswith("downsample.") else name


def network(name: str, keywords: dict[str, Any]) -> Network:
    """timm's SwinTransformer under the original's names."""
    return Network(SOURCE, "Swin", keywords | {"global_pool": "avg"}, CLASS)
