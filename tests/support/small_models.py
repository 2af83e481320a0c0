"""Every family's smallest model, made smaller: whole runs and contracts in seconds."""

from mimir_fast.models import families

SIZES = {
    "vit_nano": {"embed_dim": 12, "depth": 2, "num_heads": 3},
    "vit_ti": {"embed_dim": 24, "depth": 2, "num_heads": 3},
    "convit_ti": {"embed_dim": 6, "depth": 3, "num_heads": 4, "local_up_to_layer": 2},
    "cait_xxs24": {"embed_dim": 24, "depth": 2, "num_heads": 4, "init_values": 0.1},
    "swin_tiny": {"embed_dim": 8, "depths": (2, 1), "num_heads": (1, 2), "window_size": 3, "patch_size": 2},
    "xcit_small": {"embed_dim": 16, "depth": 2, "num_heads": 2, "cls_attn_layers": 1, "decoder_num_heads": 2},
}


def small_models(setitem) -> None:
    """setitem(dictionary, key, value) puts the sizes into the families' records."""
    for family in families.FAMILIES:
        for name in SIZES.keys() & family.sizes.keys():
            setitem(family.sizes, name, SIZES[name])
