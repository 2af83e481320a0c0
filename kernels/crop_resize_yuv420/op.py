"""Crops of images in luma and chroma.  Shapes: N numbers of the buffer, B images, S side of the results."""

import torch
from torch import Tensor

from mimir_fast.kernels._shared.crops import checked_result
from mimir_fast.kernels._shared.registration import choose
from mimir_fast.kernels.crop_resize_yuv420 import reference


def crop_resize_yuv420(
    packed_N: Tensor,
    offsets_B: Tensor,
    sizes_B2: Tensor,
    boxes_B4: Tensor,
    flips_B: Tensor,
    size: int,
    dtype: torch.dtype = torch.float32,
    impl: str = "auto",
    out: Tensor | None = None,
) -> Tensor:
    """Crop, resize and flip images with chroma at half resolution: bicubic, antialiased; RGB, rounded to 8 bits once.

    formula      clip(round(rgb(Y, Cb, Cr)), 0, 255) / 255, mirrored where flips; each plane is u X v^T with the filters of
                 crop_resize, Cb and Cr with half the box; rgb is the inverse of BT.601 in the full range
    shapes       packed [N] holds at offsets[b] a window of sizes[b] = (h, w) pixels as ceil(h/2) row pairs `Y Y Cb Cr` of W,
                 W, W/2 and W/2 numbers, W = w rounded up to even, offsets [B] and sizes [B,2] int64; boxes [B,4] (top, left,
                 height, width) in luma pixels of the window, fractions allowed, flips [B] bool -> [B,3,S,S]
    dtypes       uint8 -> fp32 in [0,1], bit-equal to the 8-bit result divided by 255, or that result (dtype=torch.uint8);
                 boxes fp32, fp32 arithmetic; not differentiable
    bytes        the boxes' pixels once, output once
    determinism  exact: fixed order
    source       Keys, Cubic Convolution Interpolation, 1981; ITU-R BT.601 and JFIF 1.02 (chroma centred between its pixels)

    Edges of a box are its top, left, top + height and left + width in fp32; the caller vouches that windows lie in the buffer
    and boxes in their windows.  The results of the two implementations differ by a level in few places.
    impl: "triton", "reference" or "auto" (triton on CUDA); out: where the results go, contiguous; None: a new tensor.
    Raises ValueError if shapes or devices disagree, or an element type, dtype or impl is not on offer.
    """
    crops = checked_result(packed_N, offsets_B, sizes_B2, boxes_B4, flips_B, size, dtype, out)
    if choose(impl, packed_N) == "triton":
        # Imported here, since CPU-only installations have no Triton.
        from mimir_fast.kernels.crop_resize_yuv420 import kernel

        kernel.crop_resize_yuv420(packed_N, offsets_B, sizes_B2, boxes_B4.float(), flips_B, crops)
        return crops
    return crops.copy_(reference.crop_resize_yuv420(packed_N, offsets_B, sizes_B2, boxes_B4, flips_B, size, dtype))
