"""Crops: the arguments that the crop operations share, and their checks.

Shapes: N numbers of the buffer, B images, S side of the results.
"""

import torch
from torch import Tensor

from mimir_fast.kernels._shared.registration import check_floats, check_indices

RESULTS = (torch.float32, torch.uint8)


def checked_result(
    packed_N: Tensor,
    offsets_B: Tensor,
    sizes_B2: Tensor,
    boxes_B4: Tensor,
    flips_B: Tensor,
    size: int,
    dtype: torch.dtype,
    out: Tensor | None,
) -> Tensor:
    """The tensor [B,3,S,S] that the crops go to: `out`, or a new one.

    Raises ValueError, naming the argument, unless a crop operation can work with these.
    """
    if packed_N.ndim != 1 or packed_N.dtype != torch.uint8:
        raise ValueError(f"packed: expected uint8 [N], got {packed_N.dtype} {tuple(packed_N.shape)}")
    # With another number of dimensions the comparison below fails, and names offsets.
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
    if out is None:
        return packed_N.new_empty((B, 3, size, size), dtype=dtype)
    _check_out(out, (B, 3, size, size), dtype, packed_N.device)
    return out


def _check_out(out: Tensor, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
    if out.shape != shape or out.dtype != dtype or out.device != device or not out.is_contiguous():
        found = f"{out.dtype} {tuple(out.shape)} on {out.device}{'' if out.is_contiguous() else ', not contiguous'}"
        raise ValueError(f"out: expected {dtype} {shape} on {device}, got {found}")
