"""What XCiT is made of beside blocks: a convolutional stem, Fourier positions, batch normalisation.

Shapes: B batch, C channels, H W sides, L patches, D width.
"""

import math
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Features of each axis; frequencies fall from 1 to 1/10000.
HIDDEN, TEMPERATURE = 32, 10000


class Statistics(NamedTuple):
    """Mean and unbiased variance [D] of a training batch."""

    mean: Tensor
    var: Tensor


class BatchNorm(nn.BatchNorm2d):
    """Batch normalisation over all positions, or over some, by its formula.

    Not torch's: on CPUs torch 2.14.1's backward pass is wrong for a batch of one whose gradient arrives channels-last, which is
    how gradients come from tokens.
    """

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor

    def normalised(self, x_BDHW: Tensor, kept_B1HW: Tensor | None = None) -> tuple[Tensor, Statistics | None]:
        """Normalised in the running statistics' type, and in training the batch's statistics, which `follow` takes.

        kept: 1 at the positions that statistics count, 0 at others; None: all are counted.
        """
        # Fp32 also where autocast and shards compute in 16 bits.
        x_BDHW = x_BDHW.to(self.running_mean.dtype)
        if not self.training:
            return self._scaled(x_BDHW, self.running_mean, self.running_var), None
        count: Tensor | int = x_BDHW.numel() // x_BDHW.shape[1]
        if kept_B1HW is None:
            var, mean = torch.var_mean(x_BDHW, (0, 2, 3), correction=0)
        else:
            # It stays on the device, which nobody waits for.
            count = kept_B1HW.sum()
            # In two passes: a mean of squares minus the squared mean would lose the digits of a small variance.
            mean = (x_BDHW * kept_B1HW).sum((0, 2, 3)) / count
            var = ((x_BDHW - mean[:, None, None]).square() * kept_B1HW).sum((0, 2, 3)) / count
        # As torch does: normalised by the biased variance, while the running one is unbiased.
        unbiased = var.detach() * (count / (count - 1))
        return self._scaled(x_BDHW, mean, var), Statistics(mean.detach(), unbiased)

    def _scaled(self, x_BDHW: Tensor, mean: Tensor, var: Tensor) -> Tensor:
        scale = self.weight * (var + self.eps).rsqrt()
        return (x_BDHW - mean[:, None, None]) * scale[:, None, None] + self.bias[:, None, None]

    @torch.no_grad()
    def follow(self, batch: Statistics | None) -> None:
        """Move the running statistics towards a batch's; those of a batch that is not finite would never be forgotten."""
        if batch is None:
            return
        fine = batch.mean.isfinite().all() & batch.var.isfinite().all()
        for running, new in ((self.running_mean, batch.mean), (self.running_var, batch.var)):
            running.copy_(torch.where(fine, torch.lerp(running, new, self.momentum or 0.0), running))
        self.num_batches_tracked.add_(fine)

    def forward(self, input: Tensor) -> Tensor:
        """[B,D,H,W] normalised; in training the running statistics follow."""
        x_BDHW, batch = self.normalised(input)
        self.follow(batch)
        return x_BDHW


class ConvolutionalStem(nn.Module):
    """Images [B,C,H,W] -> tokens [B,L,D]: convolutions of stride 2, each with batch normalisation, until a token is a patch."""

    def __init__(self, patch_size: int, channels: int, width: int):
        super().__init__()
        if patch_size not in (8, 16):
            raise ValueError(f"patch_size: XCiT's stem makes patches of 8 or 16 pixels, got {patch_size}")
        halvings = int(math.log2(patch_size))
        if width % 2 ** (halvings - 1):
            raise ValueError(f"embed_dim: expected a multiple of {2 ** (halvings - 1)}, got {width}")
        widths = [channels, *(width >> i for i in reversed(range(halvings)))]
        steps: list[nn.Module] = []
        for before, after in pairwise(widths):
            # Without a bias, which the normalisation would subtract again.
            convolution = nn.Conv2d(before, after, 3, stride=2, padding=1, bias=False)
            steps += [nn.Sequential(convolution, BatchNorm(after)), nn.GELU()]
        # Without the last GELU.  Those between count: convolutions are proj.0, proj.2, proj.4 in the original's files.
        self.proj = nn.Sequential(*steps[:-1])

    def forward(self, images: Tensor) -> Tensor:
        """In the images' precision whatever autocast says: bf16 would round a perturbation of 8/255 by up to 6 %."""
        with torch.autocast(images.device.type, enabled=False):
            return self.proj(images).flatten(2).transpose(1, 2)


class FourierPositions(nn.Module):
    """Positions of a square grid: sines and cosines of rows and columns, then a trained layer, a convolution by its shape.

    Source: Vaswani et al., Attention Is All You Need, 2017; in two dimensions as in El-Nouby et al., XCiT, 2021.
    """

    features: Tensor

    def __init__(self, width: int, grid: int):
        super().__init__()
        # For the original's names and shapes, [D,64,1,1]; its forward pass is never called.
        self.token_projection = nn.Conv2d(2 * HIDDEN, width, kernel_size=1)
        self.register_buffer("features", fourier_features(grid), persistent=False)

    def forward(self) -> Tensor:
        """[L,D], in raster order."""
        with torch.autocast(self.features.device.type, enabled=False):
            return F.linear(self.features, self.token_projection.weight.flatten(1), self.token_projection.bias)


def fourier_features(grid: int) -> Tensor:
    """Of the rows, then of the columns: [L,64] fp32, in raster order."""
    # In fp32 from the beginning, as in the original: trained projections belong to these numbers.
    # Counted from 1 and with an eps of 1e-6: the formula of Carion et al., DETR, 2020, which XCiT took over.
    positions = torch.arange(1, grid + 1, dtype=torch.float32) / (grid + 1e-6) * (2 * math.pi)
    index = torch.arange(HIDDEN, dtype=torch.float32)
    angles = positions[:, None] / TEMPERATURE ** (2 * torch.div(index, 2, rounding_mode="floor") / HIDDEN)
    axis = torch.stack([angles[:, 0::2].sin(), angles[:, 1::2].cos()], dim=2).flatten(1)
    rows, columns = axis.repeat_interleave(grid, dim=0), axis.repeat(grid, 1)
    return torch.cat([rows, columns], dim=1)
