"""Swin as a classifier.

Shapes: B batch, C channels, H W sides, L units, D the last stage's width, O classes.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mimir_fast.models.classifier import Classifier, check_head, rising_rates
from mimir_fast.models.families.swin.encoder import SwinEncoder
from mimir_fast.models.families.swin.layers import WindowAttention
from mimir_fast.models.layers import check_images, init_trunc_normal


class SwinTransformer(SwinEncoder, Classifier):
    """Patches through stages of windowed attention, their mean, then logits: images [B,C,H,W] -> [B,O].

    The state dict has the original MIMIR's keys, shapes and order, the buffers of dense windows among them.  All tokens are
    averaged whatever global_pool says, as in the original.
    drop_path: rate of stochastic depth in the last block, rising linearly from 0 in the first, over all stages; the draws are
    an argument of `forward`.  drop_path_rate: the same under timm's name.
    Windows need not tile the stage: those at the borders then hold fewer tokens.
    Sizes and compat: as in SwinEncoder; the classifier computes the same either way.
    computing: kernels, attention, mlp, residual_dtype, activation_checkpointing, mean, std, as in VisionTransformer.
    Raises ValueError where sizes do not fit together.
    Source: Liu et al., Swin Transformer: Hierarchical Vision Transformer using Shifted Windows, 2021.
    """

    row: Tensor

    def __init__(
        self,
        img_size: int = 224,
        patch_size: int = 4,
        in_chans: int = 3,
        num_classes: int = 1000,
        embed_dim: int = 96,
        depths: Sequence[int] = (2, 2, 6, 2),
        num_heads: Sequence[int] = (3, 6, 12, 24),
        window_size: int = 7,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        unit: int | None = None,
        global_pool: bool = True,
        drop_path: float = 0.0,
        drop_path_rate: float | None = None,
        compat: str | None = None,
        **computing: Any,
    ):
        drop_path = drop_path if drop_path_rate is None else drop_path_rate
        check_head(num_classes, drop_path)
        sizes = (embed_dim, depths, num_heads, window_size, mlp_ratio, qkv_bias)
        computing["drop_rates"] = rising_rates(drop_path, sum(depths))
        # masked: classifiers' files, which RobustBench loads strictly, have masks of windows; autoencoders' have none.
        super().__init__(img_size, patch_size, in_chans, *sizes, unit=unit, masked=True, compat=compat, **computing)
        self.num_classes, self.global_pool = num_classes, global_pool
        self.head = nn.Linear(self.width, num_classes)
        # Packed once: without a mask windows never change.  The 81 moved windows of 56 x 56 tokens fill 64 groups of 49
        # slots to the last one.
        self.whole = self.plan(self.num_patches)
        row = torch.from_numpy(self.whole.exact(np.arange(self.num_patches)))
        self.register_buffer("row", row, persistent=False)
        self.apply(init_trunc_normal)
        for module in self.modules():
            if isinstance(module, WindowAttention):
                nn.init.trunc_normal_(module.relative_position_bias_table, std=0.02)

    def classify(self, features: Tensor) -> Tensor:
        """Mean of the tokens [B,D] -> logits [B,O]."""
        return self.head(features)

    def forward_features(self, images: Tensor, drop_noise: Tensor | None = None) -> Tensor:
        """images [B,C,H,W] -> the mean of the normalised tokens [B,D].

        drop_noise: uniform draws [depth,2,B] of stochastic depth, see `drop_factors`; None: nothing is left out.
        Raises ValueError for images of another size.
        """
        check_images("images", images, self.in_chans, self.img_size)
        keep = None if drop_noise is None else self.drop_factors(drop_noise)
        units = self.patchify(self.normalised(images))
        # Normalised, then averaged; a ViT with global_pool does it the other way round.
        return self.run(units, self.whole.windows(self.row), keep).mean(dim=1)
