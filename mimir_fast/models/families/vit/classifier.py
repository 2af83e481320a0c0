"""The Vision Transformer as a classifier.

Shapes: B batch, C channels, H W sides, L patches, D width, O classes.
"""

import torch
from torch import Tensor, nn

from mimir_fast.models.classifier import Classifier, check_head, rising_rates
from mimir_fast.models.encoder import added
from mimir_fast.models.families.vit.encoder import ViTEncoder
from mimir_fast.models.layers import check_images, init_trunc_normal


class VisionTransformer(ViTEncoder, Classifier):
    """Patches and a class token through Transformer blocks, then logits: images [B,C,H,W] -> [B,O].

    The state dict has the original MIMIR's keys, shapes and order.  global_pool: mean over the patch tokens, fc_norm, head;
    otherwise norm, class token, head.  The positional table is trained.
    drop_path: rate of stochastic depth in the last block, rising linearly from 0 in the first; the draws are an argument of
    `forward`.  kernels, attention, mlp, residual_dtype, activation_checkpointing: as in MaskedAutoencoderViT.
    mean, std: constants of each channel that images in [0,1] are normalised with inside of the model; None: images come as
    the blocks want them.  They are no part of the state dict.
    Raises ValueError where sizes do not fit together.
    Source: Dosovitskiy et al., An Image is Worth 16x16 Words, 2021.
    """

    # one of the two is there
    norm: nn.LayerNorm
    fc_norm: nn.LayerNorm

    def __init__(
        self,
        img_size: int = 224,
        patch_size: int = 16,
        in_chans: int = 3,
        num_classes: int = 1000,
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        global_pool: bool = True,
        drop_path: float = 0.0,
        mean: tuple[float, ...] | None = None,
        std: tuple[float, ...] | None = None,
        kernels: str = "auto",
        residual_dtype: torch.dtype | None = None,
        attention: str = "auto",
        mlp: str = "auto",
        activation_checkpointing: bool = False,
    ):
        check_head(num_classes, drop_path)
        super().__init__(
            img_size,
            patch_size,
            in_chans,
            embed_dim,
            depth,
            num_heads,
            mlp_ratio,
            fixed_positions=False,
            drop_rates=rising_rates(drop_path, depth),
            mean=mean,
            std=std,
            kernels=kernels,
            residual_dtype=residual_dtype,
            attention=attention,
            mlp=mlp,
            activation_checkpointing=activation_checkpointing,
        )
        self.num_classes, self.global_pool = num_classes, global_pool
        # Two names, by which files of the two kinds of pooling are told apart; timm has the same.
        setattr(self, "fc_norm" if global_pool else "norm", nn.LayerNorm(embed_dim, eps=1e-6))
        self.head = nn.Linear(embed_dim, num_classes)
        self.apply(init_trunc_normal)
        # Deviations as in the original's classifier; that of its autoencoder starts the class token at 0.02.
        nn.init.normal_(self.cls_token, std=1e-6)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)

    def classify(self, features: Tensor) -> Tensor:
        """Tokens [B,1+L,D] -> logits [B,O]."""
        pooled = self.fc_norm(features[:, 1:].mean(dim=1)) if self.global_pool else self.norm(features[:, 0])
        return self.head(pooled)

    def forward_features(self, images: Tensor, drop_noise: Tensor | None = None) -> Tensor:
        """images [B,C,H,W] -> the last block's tokens [B,1+L,D], class token first, not normalised.

        drop_noise: uniform draws [depth,2,B] of stochastic depth, see `drop_factors`; None: nothing is left out.
        Raises ValueError for images of another size.
        """
        check_images("images", images, self.in_chans, self.img_size)
        tokens = self.embed(self.patchify(self.normalised(images)))
        keep = None if drop_noise is None else self.drop_factors(drop_noise)
        stream = self.run_blocks(tokens, keep)
        # Not normalised: the original's adaptive attacks and information terms take the tokens as the last block
        # leaves them.
        return added(stream, None if keep is None else keep[-1])
