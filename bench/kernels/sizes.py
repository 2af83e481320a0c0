"""What the recipes make of a batch."""

from dataclasses import dataclass

from mimir_fast.config.pretraining import PretrainConfig
from mimir_fast.config.pretraining_recipes import cifar10_vit_s, imagenet_vit_b, imagenet_vit_s
from mimir_fast.models.families import find


@dataclass(frozen=True)
class Size:
    """B images of `side` pixels in patches of p; D, N width and heads of the encoder, E, R of the decoder.

    Of L patches K are kept and M removed; each has P numbers.
    """

    B: int
    side: int
    p: int
    L: int
    K: int
    M: int
    P: int
    D: int
    N: int
    E: int
    R: int


def size_of(config: PretrainConfig) -> Size:
    """The size of one micro-batch of a run."""
    model, wide = config.model, find(config.model.model, pretraining=True)[1]
    patches = (model.input_size // model.patch_size) ** 2
    kept = int(patches * (1 - model.mask_ratio))
    return Size(
        B=config.optim.batch_size,
        side=model.input_size,
        p=model.patch_size,
        L=patches,
        K=kept,
        M=patches - kept,
        P=3 * model.patch_size**2,
        D=wide["embed_dim"],
        N=wide["num_heads"],
        E=wide["decoder_embed_dim"],
        R=wide["decoder_num_heads"],
    )


SIZES: dict[str, Size] = {  # the most important first
    "imagenet_vit_b": size_of(imagenet_vit_b()),
    "imagenet_vit_s": size_of(imagenet_vit_s()),
    "cifar10_vit_s": size_of(cifar10_vit_s()),
    "imagenet_vit_l": size_of(imagenet_vit_s().updated({"model": "mae_vit_large"})),
    "small": size_of(cifar10_vit_s().updated({"model": "mae_vit_ti", "patch_size": 4, "batch_size": 8})),  # for CPUs
}
