"""XCiT as a classifier.

Shapes: B batch, C channels, H W sides, L patches, D width, O classes.
"""

from typing import Any

from torch import Tensor, nn

from mimir_fast.models.classifier import Classifier, check_head
from mimir_fast.models.families.xcit.encoder import XCiTEncoder
from mimir_fast.models.layers import check_images, init_trunc_normal


class XCiT(XCiTEncoder, Classifier):
    """Images through the stem and the blocks of patches, then the class token that reads them, then logits: images [B,C,H,W]
    -> [B,O].

    The state dict has the original MIMIR's keys, shapes and order.  The class token is read whatever global_pool says, as in
    the original.
    drop_path: rate of stochastic depth, the same in every block of patches, none in the class token's; the draws are an
    argument of `forward`.
    Sizes and compat: as in XCiTEncoder; the classifier sees all patches and computes the same either way.
    computing: kernels, attention, mlp, residual_dtype, activation_checkpointing, mean, std, as in VisionTransformer; attention
    changes nothing.
    Raises ValueError where sizes do not fit together.
    Source: El-Nouby et al., XCiT: Cross-Covariance Image Transformers, 2021.
    """

    # Attention, local convolutions and MLP, each left out by a draw of its own.
    branches = 3

    def __init__(
        self,
        img_size: int = 224,
        patch_size: int = 16,
        in_chans: int = 3,
        num_classes: int = 1000,
        embed_dim: int = 384,
        depth: int = 12,
        num_heads: int = 8,
        mlp_ratio: float = 4.0,
        eta: float = 1.0,
        tokens_norm: bool = True,
        cls_attn_layers: int = 2,
        global_pool: bool = False,
        drop_path: float = 0.0,
        compat: str | None = None,
        **computing: Any,
    ):
        check_head(num_classes, drop_path)
        sizes = (embed_dim, depth, num_heads, mlp_ratio, eta, tokens_norm, cls_attn_layers)
        computing["drop_rates"] = [drop_path] * depth
        super().__init__(img_size, patch_size, in_chans, *sizes, compat=compat, **computing)
        self.num_classes, self.global_pool = num_classes, global_pool
        # Before the head; the autoencoder's comes after everything else.
        self.add_norm(embed_dim)
        self.head = nn.Linear(embed_dim, num_classes)
        self.apply(init_trunc_normal)
        nn.init.trunc_normal_(self.cls_token, std=0.02)

    def classify(self, features: Tensor) -> Tensor:
        """Tokens [B,1+L,D] -> logits [B,O]."""
        return self.head(features[:, 0])

    def forward_features(self, images: Tensor, drop_noise: Tensor | None = None) -> Tensor:
        """images [B,C,H,W] -> tokens [B,1+L,D], class token first, normalised.

        drop_noise: uniform draws [depth,3,B] of stochastic depth, see `drop_factors`; None: nothing is left out.
        Raises ValueError for images of another size.
        """
        check_images("images", images, self.in_chans, self.img_size)
        keep = None if drop_noise is None else self.drop_factors(drop_noise)
        return self.run(self.normalised(images), factors=keep)
