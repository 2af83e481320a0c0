"""Models by name: `create_model("mae_vit_small", img_size=224, patch_size=16, norm_pix_loss=True)` for pre-training,
`create_classifier("vit_small", img_size=224, patch_size=16, num_classes=1000)` for what comes after."""

from mimir_fast.models.autoencoder import MaskedAutoencoder
from mimir_fast.models.classifier import Classifier
from mimir_fast.models.families import construction
from mimir_fast.models.families.vit.autoencoder import MaskedAutoencoderViT
from mimir_fast.models.families.vit.classifier import VisionTransformer

__all__ = [
    "Classifier",
    "MaskedAutoencoder",
    "MaskedAutoencoderViT",
    "VisionTransformer",
    "create_classifier",
    "create_model",
]


def create_model(name: str, *, compat: str | None = None, **options) -> MaskedAutoencoder:
    """A masked autoencoder for pre-training, freshly initialised, in fp32 on the default device.

    name      one of mimir_fast.models.families.model_names(True), such as mae_vit_small; names of the original with their
              suffixes too: mae_vit_base_dec128d2b is mae_vit_base, mae_vit_ti_patch16 is mae_vit_ti; or a family's, such as
              convit, whose sizes are then options or the class's defaults
    compat    "original": the model computes what the original does, also where that is a defect (docs/fidelity.md); None: the
              corrected form.  A ViT is the same either way
    options   go to the family's class (MaskedAutoencoderViT): img_size and patch_size in pixels (default 224 and 16),
              norm_pix_loss, kernels, attention, residual_dtype, ...; they replace the name's own sizes
    Called with images [B,C,H,W] it returns loss, predictions [B,L,P], mask [B,L] and latent [B,1+K,D].
    Raises ValueError for an unknown name, or where sizes do not fit together.
    Source: He et al., Masked Autoencoders Are Scalable Vision Learners, 2022; MIMIR, arXiv 2312.04960.
    """
    family, sizes = construction(name, True, compat)
    return family.autoencoder(**{**sizes, **options})


def create_classifier(name: str, *, compat: str | None = None, **options) -> Classifier:
    """A classifier, freshly initialised, in fp32 on the default device.

    name      one of mimir_fast.models.families.model_names(False), such as vit_small, or vit_large_patch16, which is vit_large;
              or a family's, such as convit
    compat    "original": computed and trained as in the original, see create_model
    options   go to the family's class (VisionTransformer): img_size and patch_size in pixels (default 224 and 16),
              num_classes, global_pool, drop_path, ...; they replace the name's own sizes
    Called with images [B,C,H,W] it returns logits [B,O].
    Raises ValueError for an unknown name, or where sizes do not fit together.
    Source: Dosovitskiy et al., An Image is Worth 16x16 Words, 2021; MIMIR, arXiv 2312.04960.
    """
    family, sizes = construction(name, False, compat)
    return family.classifier(**{**sizes, **options})
