"""crop_resize in plain PyTorch, image by image: two passes over the taps, each a sum of shifted rows.

Shapes: N numbers of the packed buffer, B images, S side of the results, h w rows and columns of a window, T taps.
"""

import math

import torch
from torch import Tensor

# Half the width of the filter, in pixels where nothing is reduced.
SUPPORT = 2.0


def crop_resize(
    packed_N: Tensor,
    offsets_B: Tensor,
    sizes_B2: Tensor,
    boxes_B4: Tensor,
    flips_B: Tensor,
    size: int,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """See op.py; [B,3,S,S].  Computes in the boxes' dtype, at least fp32."""
    crops = packed_N.new_empty((len(offsets_B), 3, size, size))
    for crop, offset, (h, w), box in zip(crops, offsets_B.tolist(), sizes_B2.tolist(), boxes_B4):
        window_hwC = packed_N[offset : offset + h * w * 3].view(h, w, 3)
        crop.copy_(resized(window_hwC, box, size).permute(2, 0, 1))
    return finish(crops, flips_B, dtype)


def resized(window_hwC: Tensor, box_4: Tensor, size: int) -> Tensor:
    """One crop of a window of uint8 colours: uint8 [S,S,C]."""
    top, left, height, width = box_4.to(torch.promote_types(box_4.dtype, torch.float32))
    wide_ShC = weighted(window_hwC.transpose(0, 1), *taps(left, width, window_hwC.shape[1], size))
    return levels(weighted(levels(wide_ShC).transpose(0, 1), *taps(top, height, window_hwC.shape[0], size)))


def taps(start: Tensor, length: Tensor, extent: int, size: int) -> tuple[Tensor, Tensor]:
    """Along one side of a box: the pixels [S,T] that each result is made of, and their weights, which sum to 1.

    start, length   of the box on this side, in pixels
    extent          how many pixels there are; those that the box does not touch have weight 0
    """
    first = start.floor().clamp(0, extent - 1)
    last = (start + length).ceil().clamp(max=extent).maximum(first + 1)
    scale = length / size
    # Reducing, the filter is as much wider as the results are farther apart: it then averages what it leaves out.
    stretch = scale.clamp(min=1)
    # From the box's first pixel on: in a large window fp32 has more places for the distances that way.
    centre_S1 = (start - first) + (torch.arange(size, device=start.device)[:, None] + 0.5) * scale
    count = 2 * math.ceil(SUPPORT * float(stretch)) + 1
    pixel_ST = (centre_S1 - SUPPORT * stretch).floor() + torch.arange(count, device=start.device)
    inside_ST = (pixel_ST >= 0) & (pixel_ST < last - first)
    weights_ST = torch.where(inside_ST, bicubic((pixel_ST + 0.5 - centre_S1) / stretch), 0.0)
    pixel_ST = pixel_ST + first
    return pixel_ST.clamp(0, extent - 1).long(), weights_ST / weights_ST.sum(1, keepdim=True)


def bicubic(distance: Tensor) -> Tensor:
    """The cubic convolution filter with a = -0.5."""
    x = distance.abs()
    near = (1.5 * x - 2.5) * x * x + 1
    far = ((-0.5 * x + 2.5) * x - 4) * x + 2
    return torch.where(x < 1, near, torch.where(x < SUPPORT, far, 0.0))


def weighted(pixels: Tensor, pixel_ST: Tensor, weights_ST: Tensor) -> Tensor:
    """Results [S,...] in the weights' dtype: the sum over t of weights[:,t] times pixels[pixel[:,t]] of [extent,...]."""
    first, last = int(pixel_ST.min()), int(pixel_ST.max()) + 1
    # Copied before it is converted: bytes are moved where rows and columns change places.
    rows = pixels[first:last].flatten(1).to(weights_ST.dtype)
    total = rows.new_zeros(len(pixel_ST), rows.shape[1])
    # Tap by tap: a product of matrices would multiply by zeros mostly, and in tf32 where that is allowed.
    for index_S, weight_S in zip((pixel_ST - first).T, weights_ST.T):
        total.addcmul_(rows.index_select(0, index_S), weight_S[:, None])
    return total.unflatten(1, pixels.shape[1:])


def levels(values: Tensor) -> Tensor:
    """Rounded to whole levels, halves up, and clamped to 0..255: uint8."""
    return (values + 0.5).floor().clamp(0, 255).to(torch.uint8)


def finish(crops_BCSS: Tensor, flips_B: Tensor, dtype: torch.dtype) -> Tensor:
    """Mirrored left to right where asked, and divided by 255 unless uint8 is asked for."""
    crops_BCSS = torch.where(flips_B[:, None, None, None], crops_BCSS.flip(3), crops_BCSS)
    if dtype == torch.uint8:
        return crops_BCSS
    # A divisor on the device: CUDA would turn division by a Python number into a less exact multiplication.
    return crops_BCSS.to(dtype).div_(torch.full((), 255.0, device=crops_BCSS.device))
