"""ConViT as a classifier.

Shapes: B batch, C channels, H W sides, L patches, D width, O classes.
"""

from typing import Any

from torch import Tensor, nn

from mimir_fast.models.classifier import Classifier, check_head, rising_rates
from mimir_fast.models.families.convit.encoder import ConViTEncoder
from mimir_fast.models.layers import add_and_norm, check_images, init_trunc_normal


class ConViT(ConViTEncoder, Classifier):
    """Patches through local blocks, then with a class token through ordinary ones, then logits: images [B,C,H,W] -> [B,O].

    The state dict has the original MIMIR's keys, shapes and order: without biases of queries, keys and values unless
    qkv_bias says so.  The class token is read whatever global_pool says, as in the original.
    drop_path: rate of stochastic depth in the last block, rising linearly from 0 in the first; the draws are an argument of
    `forward`.  locality_strength: how sharply local heads look at their places when training begins.
    Sizes and compat: as in ConViTEncoder; the classifier sees all patches and computes the same either way.
    computing: kernels, attention, mlp, residual_dtype, activation_checkpointing, mean, std, as in VisionTransformer.
    Raises ValueError where sizes do not fit together.
    Source: d'Ascoli et al., ConViT: Improving Vision Transformers with Soft Convolutional Inductive Biases, 2021.
    """

    def __init__(
        self,
        img_size: int = 224,
        patch_size: int = 16,
        in_chans: int = 3,
        num_classes: int = 1000,
        embed_dim: int = 48,
        depth: int = 12,
        num_heads: int = 16,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = False,
        local_up_to_layer: int = 10,
        locality_strength: float = 1.0,
        global_pool: bool = False,
        drop_path: float = 0.0,
        compat: str | None = None,
        **computing: Any,
    ):
        check_head(num_classes, drop_path)
        sizes = (embed_dim, depth, num_heads, mlp_ratio, qkv_bias, local_up_to_layer)
        computing["drop_rates"] = rising_rates(drop_path, depth)
        super().__init__(img_size, patch_size, in_chans, *sizes, compat=compat, **computing)
        self.num_classes, self.global_pool = num_classes, global_pool
        self.norm = nn.LayerNorm(self.width, eps=1e-6)
        self.head = nn.Linear(self.width, num_classes)
        self.apply(init_trunc_normal)
        for parameter in (self.cls_token, self.pos_embed):
            nn.init.trunc_normal_(parameter, std=0.02)
        self.start_as_convolution(locality_strength, lambda weight: nn.init.trunc_normal_(weight, std=0.02))

    def classify(self, features: Tensor) -> Tensor:
        """Tokens [B,1+L,D] -> logits [B,O]."""
        return self.head(features[:, 0])

    def forward_features(self, images: Tensor, drop_noise: Tensor | None = None) -> Tensor:
        """images [B,C,H,W] -> tokens [B,1+L,D], class token first, normalised.

        drop_noise: uniform draws [depth,2,B] of stochastic depth, see `drop_factors`; None: nothing is left out.
        Raises ValueError for images of another size.
        """
        check_images("images", images, self.in_chans, self.img_size)
        keep = None if drop_noise is None else self.drop_factors(drop_noise)
        stream = self.run(self.patchify(self.normalised(images)), factors=keep)
        last = None if keep is None else keep[-1]
        return add_and_norm(*stream, self.norm, self.kernels, self.norm.weight.dtype, keep_B=last)[1]
