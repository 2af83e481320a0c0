"""Base class of Transformer encoders, which a family's masked autoencoder and classifier share.

Shapes: B batch, C channels, H W sides, L patches, K kept patches, P = C*p*p numbers per patch, T tokens, D width.
"""

from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mimir_fast.kernels import patch_gather
from mimir_fast.kernels.masked_patch_loss import reference

# Nothing in a block is random: there is no generator state to keep, which would wait for the device.
recomputed = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)

# What `Block` takes and returns: tokens, what is to be added to them, and the bias of that addition.
Stream = tuple[Tensor, Tensor | None, Tensor | None]


class Encoder(nn.Module):
    """Cutting images into patches, and a list `blocks` of layers.Block or of modules that are called alike.

    The subclass makes `blocks`, and whatever comes before and after them.  It initialises all parameters.

    img_size, patch_size, in_chans   images are [B,in_chans,img_size,img_size], patches squares of side patch_size
    drop_rates                every block's rate of stochastic depth; None: there is none, and no buffer for it
    mean, std                 constants of each channel that images in [0,1] are normalised with inside of the model; None:
                              images come as the blocks want them.  They are no part of the state dict
    kernels                   implementation of the operations in mimir_fast.kernels: auto, triton or reference
    residual_dtype            storage of the tokens between blocks; None: the type in which they are computed
    activation_checkpointing  keep each block's inputs only, and compute the block again in the backward pass
    Raises ValueError where patches do not tile the image.
    """

    blocks: nn.ModuleList
    rates: Tensor
    mean: Tensor | None
    std: Tensor | None

    def __init__(
        self,
        img_size: int,
        patch_size: int,
        in_chans: int,
        *,
        drop_rates: Sequence[float] | None = None,
        mean: tuple[float, ...] | None = None,
        std: tuple[float, ...] | None = None,
        kernels: str = "auto",
        residual_dtype: torch.dtype | None = None,
        activation_checkpointing: bool = False,
    ):
        super().__init__()
        if patch_size < 1 or img_size % patch_size:
            raise ValueError(f"patch_size: {patch_size} does not divide the image side {img_size}")
        if (mean is None) != (std is None):
            raise ValueError("mean, std: give both or neither")
        self.img_size, self.patch_size, self.in_chans = img_size, patch_size, in_chans
        self.kernels, self.residual_dtype = kernels, residual_dtype
        self.activation_checkpointing, self.drop_rates = activation_checkpointing, drop_rates or ()
        self.grid = img_size // patch_size
        self.num_patches = self.grid**2
        # Not persistent: loading is strict, and the original's files have no such entries.
        for name, values, shape in (("rates", drop_rates, (-1,)), ("mean", mean, (-1, 1, 1)), ("std", std, (-1, 1, 1))):
            constants = None if values is None else torch.tensor(values).view(shape)
            self.register_buffer(name, constants, persistent=False)

    def normalised(self, images: Tensor) -> Tensor:
        """Images in [0,1] as the blocks want them: (images - mean) / std, or as they are without constants."""
        return images if self.mean is None or self.std is None else (images - self.mean) / self.std

    def patchify(self, images: Tensor, ids_keep: Tensor | None = None) -> Tensor:
        """Patches of images [B,C,H,W], each in (channel, row, column) order: those with ids_keep [B,K] in that order, [B,K,P],
        or all in raster order, [B,L,P]."""
        if ids_keep is None:
            return reference.patchify(images, self.patch_size).flatten(2)
        return patch_gather(images, ids_keep, self.patch_size, impl=self.kernels)

    def residual(self, tokens: Tensor) -> Tensor:
        """Tokens in the type in which they are stored between blocks."""
        return tokens if self.residual_dtype is None else tokens.to(self.residual_dtype)

    def run_blocks(
        self,
        tokens: Tensor,
        factors: Tensor | None = None,
        first: int = 0,
        end: int | None = None,
        given: tuple[Tensor, ...] = (),
    ) -> Stream:
        """Tokens [B,T,D] through blocks[first:end], all by default; the last addition is left to the caller.

        factors: see `drop_factors`; given: further arguments of these blocks.
        """
        stream: Stream = (tokens, None, None)
        for i in range(first, len(self.blocks) if end is None else end):
            # Entry 2i is for the addition that block i finds pending (the MLP of block i - 1), 2i + 1 for its own
            # attention.
            two = None if factors is None else factors[2 * i : 2 * i + 2]
            block = self.blocks[i]
            stream = (
                recomputed(block, *stream, 0, two, *given)
                if self.activation_checkpointing
                else block(*stream, 0, two, *given)
            )
        return stream

    def drop_factors(self, draws: Tensor) -> Tensor:
        """Stochastic depth: uniform draws [depth,2,B] -> each image's factor of what is added to the stream, [1+2*depth,B] in
        fp32: before the first block (nothing is), then attention and MLP of every block.

        A draw below the block's rate leaves out the image's branch (0 attention, 1 MLP); else it is divided by 1 - rate.
        """
        rates = self.rates[:, None, None].float()
        # Divided while training, so that the expectation is 1 and evaluation needs no factors.
        keep = (draws >= rates) / (1 - rates)
        return F.pad(keep.flatten(0, 1), (0, 0, 1, 0), value=1.0)


def added(stream: Stream, keep_B: Tensor | None = None) -> Tensor:
    """The tokens with what `run_blocks` left to add; keep: each image's factor of it, for stochastic depth."""
    tokens, delta, bias = stream
    # There is a last block, whose addition is left to do.
    assert delta is not None
    assert bias is not None
    delta = delta + bias.to(delta.dtype)
    return tokens + (delta if keep_B is None else delta * keep_B[:, None, None].to(delta.dtype))
