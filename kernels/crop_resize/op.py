"""Crops of images that lie packed in one buffer.  Shapes: N numbers of the buffer, B images, S side of the results."""

import torch
from torch import Tensor

from mimir_fast.kernels._shared.registration import check_floats, check_indices, choose
from mimir_fast.kernels.crop_resize import reference

RESULTS = (torch.float32, torch.uint8)


def crop_resize(
    packed_N: Tensor,
    offsets_B: Tensor,
    sizes_B2: Tensor,
    boxes_B4: Tensor,
    flips_B: Tensor,
    size: int,
    dtype: torch.dtype = torch.float32,
    impl: str = "auto",
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
    impl: "triton", "reference" or "auto" (triton on CUDA).
    Raises ValueError if shapes or devices disagree, or an element type, dtype or impl is not on offer.
    """
    check_crops(packed_N, offsets_B, sizes_B2, boxes_B4, flips_B, size, dtype)
    if choose(impl, packed_N) == "triton":
        # Imported here, since CPU-only installations have no Triton.
        from mimir_fast.kernels.crop_resize import kernel

        arguments = (packed_N, offsets_B, sizes_B2, boxes_B4.float(), flips_B, size, dtype == torch.float32)
        return kernel.crop_resize(*arguments)
    return reference.crop_resize(packed_N, offsets_B, sizes_B2, boxes_B4, flips_B, size, dtype)


def check_crops(packed_N, offsets_B, sizes_B2, boxes_B4, flips_B, size: int, dtype: torch.dtype) -> None:
    """Raise ValueError, naming the argument, unless a crop operation can work with these."""
    if packed_N.ndim != 1 or packed_N.dtype != torch.uint8:
        raise ValueError(f"packed: expected uint8 [N], got {packed_N.dtype} {tuple(packed_N.shape)}")
    B = len(offsets_B) if offsets_B.ndim == 1 else 0
    for name, tensor, shape in (
        ("offsets", offsets_B, (B,)), ("sizes", sizes_B2, (B, 2)), ("boxes", boxes_B4, (B, 4)), ("flips", flips_B, (B,))
    ):  # fmt: skip
        if tensor.shape != shape:
            raise ValueError(f"{name}: expected {list(shape)}, got {tuple(tensor.shape)}")
    check_indices(packed_N.device, offsets=offsets_B, sizes=sizes_B2)
    check_floats(packed_N.device, boxes=boxes_B4)
    if flips_B.dtype != torch.bool or flips_B.device != packed_N.device:
        raise ValueError(f"flips: expected bool on {packed_N.device}, got {flips_B.dtype} on {flips_B.device}")
    if size < 1:
        raise ValueError(f"size: expected at least 1, got {size}")
    if dtype not in RESULTS:
        raise ValueError(f"dtype: expected torch.float32 or torch.uint8, got {dtype}")
