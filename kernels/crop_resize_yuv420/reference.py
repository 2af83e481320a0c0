"""crop_resize_yuv420 in plain PyTorch, image by image: every plane resampled, then the colours of all.

Shapes: N numbers of the packed buffer, B images, S side of the results, h w rows and columns of a window.
"""

import torch
from torch import Tensor

from mimir_fast.kernels._shared.bt601 import BLUE, CB, CR, GREEN, GREY, RED
from mimir_fast.kernels.crop_resize.reference import finish, levels, taps, weighted


def crop_resize_yuv420(
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
        pairs, even = (h + 1) // 2, w + w % 2
        rows = packed_N[offset : offset + pairs * 3 * even].view(pairs, 3 * even)
        luma_hw, chroma_hwC = planes(rows, even)
        box = box.to(torch.promote_types(box.dtype, torch.float32))
        # Two luma pixels lie in a chroma pixel on each side, which makes its centre theirs, as in JPEG.
        cb, cr = (resampled(chroma_hwC, box / 2, size) - GREY).unbind(2)
        crop.copy_(levels(torch.stack(colours(resampled(luma_hw[:h, :w], box, size), cb, cr))))
    return finish(crops, flips_B, dtype)


def planes(rows: Tensor, even: int) -> tuple[Tensor, Tensor]:
    """Y [2P,W] and Cb, Cr [P,W/2,2] of P packed row pairs `Y Y Cb Cr` [P,3W], W even."""
    luma, chroma = rows.split([2 * even, even], dim=1)
    return luma.reshape(-1, even), chroma.unflatten(1, (2, -1)).transpose(1, 2)


def resampled(plane_hw: Tensor, box_4: Tensor, size: int) -> Tensor:
    """The box of a plane [h,w,...] at the size of the result, not rounded: [S,S,...]."""
    top, left, height, width = box_4
    wide_Sh = weighted(plane_hw.transpose(0, 1), *taps(left, width, plane_hw.shape[1], size))
    return weighted(wide_Sh.transpose(0, 1), *taps(top, height, plane_hw.shape[0], size))


def colours(luma: Tensor, cb: Tensor, cr: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Red, green and blue of luma and of chroma around 0, all of the full range 0..255 (BT.601, as in JPEG)."""
    red, blue = luma + CR * cr, luma + CB * cb
    return red, (luma - RED * red - BLUE * blue) / GREEN, blue
