"""The Vision Transformer's encoder, which the masked autoencoder and the classifier share.

Shapes: B batch, C channels, H W sides, L patches, K kept patches, P = C*p*p numbers per patch, D width.
"""

from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mimir_fast.kernels import patch_gather
from mimir_fast.kernels.masked_patch_loss import reference
from mimir_fast.models.layers import Block, PatchEmbed, sincos_table

# nothing in a block is random: no generator state to keep, which would wait for the device
recomputed = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)

# what `Block` takes and returns: tokens, what is to be added to them, and that one's bias
Stream = tuple[Tensor, Tensor | None, Tensor | None]


class Encoder(nn.Module):
    """Patches and a class token through Transformer blocks.  Sizes and switches as in MaskedAutoencoderViT.

    fixed_positions   the positional table is the sine-cosine one and not trained; else zeros, for the subclass to initialise
    drop_rates        every block's rate of stochastic depth; None: there is none, and no buffer for it
    mean, std         constants of each channel that images in [0,1] are normalised with inside of the model; None: images come
                      as the blocks want them.  They are no part of the state dict
    The weights are as torch's modules draw them; the subclass initialises them once all its modules are there.
    """

    rates: Tensor
    mean: Tensor | None
    std: Tensor | None

    def __init__(
        self,
        img_size: int,
        patch_size: int,
        in_chans: int,
        embed_dim: int,
        depth: int,
        num_heads: int,
        mlp_ratio: float,
        *,
        fixed_positions: bool,
        drop_rates: Sequence[float] | None = None,
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
        if depth < 1:
            raise ValueError(f"depth: expected 1 or more, got {depth}")
        if (mean is None) != (std is None):
            raise ValueError("mean, std: give both or neither")
        self.img_size, self.patch_size, self.in_chans = img_size, patch_size, in_chans
        self.kernels, self.residual_dtype = kernels, residual_dtype
        self.activation_checkpointing, self.drop_rates = activation_checkpointing, drop_rates or ()
        self.grid = img_size // patch_size
        self.num_patches = self.grid**2
        # parameters before modules: the order of the state dict is part of the checkpoint format
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        if fixed_positions:
            self.pos_embed = nn.Parameter(sincos_table(embed_dim, self.grid)[None], requires_grad=False)
        else:
            self.pos_embed = nn.Parameter(torch.zeros(1, 1 + self.num_patches, embed_dim))
        self.patch_embed = PatchEmbed(patch_size, in_chans, embed_dim)
        self.blocks = nn.ModuleList(
            [Block(embed_dim, num_heads, mlp_ratio, attention, kernels, mlp) for _ in range(depth)]
        )
        for name, values, shape in (("rates", drop_rates, (-1,)), ("mean", mean, (-1, 1, 1)), ("std", std, (-1, 1, 1))):
            constants = None if values is None else torch.tensor(values).view(shape)
            self.register_buffer(name, constants, persistent=False)

    def patchify(self, images: Tensor, ids_keep: Tensor | None = None) -> Tensor:
        """Patches of images [B,C,H,W], each in (channel, row, column) order: those with ids_keep [B,K] in that order, [B,K,P],
        or all in raster order, [B,L,P]."""
        if ids_keep is None:
            return reference.patchify(images, self.patch_size).flatten(2)
        return patch_gather(images, ids_keep, self.patch_size, impl=self.kernels)

    def embed(self, patches: Tensor, ids_keep: Tensor | None = None) -> Tensor:
        """Patches [B,K,P] and where they were [B,K] (None: all, in raster order) -> tokens [B,1+K,D], class token first."""
        tokens = self.patch_embed(patches)
        tokens = tokens + (self.pos_embed[:, 1:] if ids_keep is None else self.pos_embed[0, 1:][ids_keep])
        cls_token = (self.cls_token + self.pos_embed[:, :1]).expand(len(tokens), -1, -1)
        return self.residual(torch.cat([cls_token, tokens], dim=1))

    def residual(self, tokens: Tensor) -> Tensor:
        """Tokens in the type in which they are stored between blocks."""
        return tokens if self.residual_dtype is None else tokens.to(self.residual_dtype)

    def run_blocks(self, tokens: Tensor, factors: Tensor | None = None) -> Stream:
        """Tokens [B,T,D] through all blocks; the last addition is left to the caller.  factors: see `drop_factors`."""
        stream: Stream = (tokens, None, None)
        for i, block in enumerate(self.blocks):
            two = None if factors is None else factors[2 * i : 2 * i + 2]
            stream = recomputed(block, *stream, 0, two) if self.activation_checkpointing else block(*stream, 0, two)
        return stream

    def drop_factors(self, draws: Tensor) -> Tensor:
        """Stochastic depth: uniform draws [depth,2,B] -> each image's factor of what is added to the stream, [1+2*depth,B] in
        fp32: before the first block (nothing is), then attention and MLP of every block.

        A draw below the block's rate leaves out the image's branch (0 attention, 1 MLP); else it is divided by 1 - rate.
        """
        rates = self.rates[:, None, None].float()
        keep = (draws >= rates) / (1 - rates)
        return F.pad(keep.flatten(0, 1), (0, 0, 1, 0), value=1.0)
