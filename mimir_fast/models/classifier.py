"""The Vision Transformer as a classifier: the encoder of the masked autoencoder on all patches, with a head.

Shapes: B batch, C channels, H W sides, L patches, P = C*p*p numbers per patch, D width, O classes.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mimir_fast.models.layers import Block, PatchEmbed
from mimir_fast.models.mae import recomputed


class VisionTransformer(nn.Module):
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
        super().__init__()
        if patch_size < 1 or img_size % patch_size:
            raise ValueError(f"patch_size: {patch_size} does not divide the image side {img_size}")
        if num_classes < 1:
            raise ValueError(f"nb_classes: expected 1 or more, got {num_classes}")
        if not 0 <= drop_path < 1:
            raise ValueError(f"drop_path: expected 0 <= rate < 1, got {drop_path}")
        if (mean is None) != (std is None):
            raise ValueError("mean, std: give both or neither")
        self.img_size, self.patch_size, self.num_classes = img_size, patch_size, num_classes
        self.global_pool, self.kernels, self.residual_dtype = global_pool, kernels, residual_dtype
        self.activation_checkpointing = activation_checkpointing
        self.drop_rates = [drop_path * i / max(depth - 1, 1) for i in range(depth)]
        self.register_buffer("rates", torch.tensor(self.drop_rates), persistent=False)
        self.num_patches = (img_size // patch_size) ** 2
        # declared first: the order of the state dict is part of the checkpoint format
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, self.num_patches + 1, embed_dim))
        self.patch_embed = PatchEmbed(patch_size, in_chans, embed_dim)
        self.blocks = nn.ModuleList(
            [Block(embed_dim, num_heads, mlp_ratio, attention, kernels, mlp) for _ in range(depth)]
        )
        setattr(self, "fc_norm" if global_pool else "norm", nn.LayerNorm(embed_dim, eps=1e-6))
        self.head = nn.Linear(embed_dim, num_classes)
        for name, values in (("mean", mean), ("std", std)):
            constants = None if values is None else torch.tensor(values).view(-1, 1, 1)
            self.register_buffer(name, constants, persistent=False)
        self.apply(_init_linear)
        nn.init.normal_(self.cls_token, std=1e-6)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)

    def forward(self, images: Tensor, drop_noise: Tensor | None = None) -> Tensor:
        """images [B,C,H,W], draws of stochastic depth (see `forward_features`) -> logits [B,O]."""
        return self.classify(self.forward_features(images, drop_noise))

    def classify(self, tokens: Tensor) -> Tensor:
        """What `forward_features` returns, [B,1+L,D] -> logits [B,O]."""
        pooled = self.fc_norm(tokens[:, 1:].mean(dim=1)) if self.global_pool else self.norm(tokens[:, 0])
        return self.head(pooled)

    def forward_features(self, images: Tensor, drop_noise: Tensor | None = None) -> Tensor:
        """images [B,C,H,W] -> the last block's tokens [B,1+L,D], class token first, not normalised.

        drop_noise: uniform draws [depth,2,B]; a draw below the block's rate leaves out the image's branch (0 attention, 1 MLP).
        None: nothing is left out.  Raises ValueError for images of another size.
        """
        expected = (self.patch_embed.proj.in_channels, self.img_size, self.img_size)
        if images.ndim != 4 or images.shape[1:] != expected:
            raise ValueError(f"images: expected [B,{','.join(map(str, expected))}], got {tuple(images.shape)}")
        if self.mean is not None:
            images = (images - self.mean) / self.std
        tokens = self.patch_embed(self.patchify(images)) + self.pos_embed[:, 1:]
        cls_token = (self.cls_token + self.pos_embed[:, :1]).expand(len(tokens), -1, -1)
        tokens = torch.cat([cls_token, tokens], dim=1)
        if self.residual_dtype is not None:
            tokens = tokens.to(self.residual_dtype)
        keep = None if drop_noise is None else self.factors(drop_noise)
        stream = (tokens, None, None)
        for i, block in enumerate(self.blocks):
            two = None if keep is None else keep[2 * i : 2 * i + 2]
            stream = recomputed(block, *stream, 0, two) if self.activation_checkpointing else block(*stream, 0, two)
        tokens, delta, bias = stream
        delta = delta + bias.to(delta.dtype)
        return tokens + (delta if keep is None else delta * keep[-1, :, None, None].to(delta.dtype))

    def factors(self, drop_noise: Tensor) -> Tensor:
        """Draws [depth,2,B] -> each image's factor of what is added to the stream, [1+2*depth,B] fp32: before the first block
        (nothing is), then attention and MLP of every block."""
        rates = self.rates[:, None, None].float()
        keep = (drop_noise >= rates) / (1 - rates)
        return F.pad(keep.flatten(0, 1), (0, 0, 1, 0), value=1.0)

    def patchify(self, images: Tensor) -> Tensor:
        """All patches of images [B,C,H,W]: [B,L,P] in (channel, row, column) order."""
        p = self.patch_size
        patches = images.unflatten(3, (-1, p)).unflatten(2, (-1, p))  # [B,C,h,p,w,p]
        return patches.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


def _init_linear(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)
