"""Models by name: `create_model("mae_vit_small", img_size=224, patch_size=16, norm_pix_loss=True)` for pre-training,
`create_classifier("vit_small", img_size=224, patch_size=16, num_classes=1000)` for what comes after."""

from mimir_fast.models.classifier import VisionTransformer
from mimir_fast.models.mae import MaskedAutoencoderViT

__all__ = ["CLASSIFIERS", "MODELS", "MaskedAutoencoderViT", "VisionTransformer", "create_classifier", "create_model"]

MODELS = {
    # ours, for demonstrations on CPUs; the others are the original's
    "mae_vit_nano": {"embed_dim": 96, "depth": 4, "num_heads": 3},
    "mae_vit_ti": {"embed_dim": 192, "depth": 12, "num_heads": 3},
    "mae_vit_small": {"embed_dim": 384, "depth": 12, "num_heads": 6},
    "mae_vit_small_ds": {"embed_dim": 768, "depth": 8, "num_heads": 8, "mlp_ratio": 3.0},
    "mae_vit_base": {"embed_dim": 768, "depth": 12, "num_heads": 12},
    "mae_vit_large": {"embed_dim": 1024, "depth": 24, "num_heads": 16},
}
CLASSIFIERS = {name.removeprefix("mae_"): sizes for name, sizes in MODELS.items()}
DECODER = {"decoder_embed_dim": 128, "decoder_depth": 2, "decoder_num_heads": 16}
# the original's command lines name these models by default without defining them
ALIASES = {"mae_vit_ti_patch16": "mae_vit_ti"}
CLASSIFIER_ALIASES = {"vit_large_patch16": "vit_large"}


def create_model(name: str, **options) -> MaskedAutoencoderViT:
    """Build a pre-training model; `options` go to MaskedAutoencoderViT (img_size, patch_size, norm_pix_loss, ...).

    Names also carry the decoder's suffix: mae_vit_base_dec128d2b is mae_vit_base.
    Raises ValueError for an unknown name.
    """
    base = ALIASES.get(name, name).removesuffix("_dec128d2b")
    if base not in MODELS:
        raise ValueError(f"model: unknown name {name!r}; choose one of {', '.join(MODELS)}")
    return MaskedAutoencoderViT(**{**MODELS[base], **DECODER, **options})


def create_classifier(name: str, **options) -> VisionTransformer:
    """Build a classifier; `options` go to VisionTransformer (img_size, patch_size, num_classes, drop_path, ...).

    Raises ValueError for an unknown name.
    """
    base = CLASSIFIER_ALIASES.get(name, name)
    if base not in CLASSIFIERS:
        raise ValueError(f"model: unknown name {name!r}; choose one of {', '.join(CLASSIFIERS)}")
    return VisionTransformer(**{**CLASSIFIERS[base], **options})
