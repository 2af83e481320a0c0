"""Crops of images that lie packed in one buffer.  Shapes: N numbers of the buffer, B images, S side of the results."""

import torch
from torch import Tensor

from mimir_fast.kernels._shared.crops import checked_result
from mimir_fast.kernels._shared.registration import choose
from mimir_fast.kernels.crop_resize import reference


def crop_resize(
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
    """Crop, resize and flip RGB images of any sizes: bicubic, antialiased, from and to 8 bits as Pillow does it.

    formula      p = clip(round(sum_j u[x,j] w[y,j]), 0, 255), then clip(round(sum_i v[y,i] p[i,x]), 0, 255) / 255, mirrored
                 where flips; u and v are the cubic filter (a = -0.5) around the places of the results, as wide as these are
                 apart if that is more than a pixel, over the pixels that the box touches, summing to 1
    shapes       packed [N] holds at offsets[b] a window of sizes[b] = (rows, columns) in rows of interleaved RGB, offsets [B]
                 and sizes [B,2] int64; boxes [B,4] (top, left, height, width) in pixels of the window, fractions allowed,
                 flips [B] bool -> [B,3,S,S]
    dtypes       uint8 -> fp32 in [0,1], bit-equal to the 8-bit result divided by 255, or that result (dtype=torch.uint8);
                 boxes fp32, fp32 arithmetic; not differentiable
    bytes        the boxes' pixels once, output once
    determinism  exact: fixed order
    source       Keys, Cubic Convolution Interpolation, 1981; widened for reduction and rounded between the passes as Pillow's

    Edges of a box are its top, left, top + height and left + width in fp32; the caller vouches that windows lie in the buffer
    and boxes in their windows.  The results of the two implementations differ by a level in few places.
    impl: "triton", "reference" or "auto" (triton on CUDA); out: where the results go, contiguous; None: a new tensor.
    Raises ValueError if shapes or devices disagree, or an element type, dtype or impl is not on offer.
    """
    crops = checked_result(packed_N, offsets_B, sizes_B2, boxes_B4, flips_B, size, dtype, out)
    if choose(impl, packed_N) == "triton":
        # Imported here, since CPU-only installations have no Triton.
        from mimir_fast.kernels.crop_resize import kernel

        kernel.crop_resize(packed_N, offsets_B, sizes_B2, boxes_B4.float(), flips_B, crops)
        return crops
    return crops.copy_(reference.crop_resize(packed_N, offsets_B, sizes_B2, boxes_B4, flips_B, size, dtype))
