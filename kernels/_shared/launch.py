"""Launches: what they share, and how an operation tells the compile gate which kernels it can launch."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

STORAGE = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
# Whether multiply-adds are fused is said at every launch: Triton's default depends on its version.
FUSED = {"enable_fp_fusion": True}


@dataclass(frozen=True)
class Launch:
    """One call of launchers on tensors of device "meta": shapes, strides and dtypes, no data, nothing runs.

    The gate records every kernel that `call` launches, with its argument types, constants and warps, and compiles it.

    config    what distinguishes this call, e.g. "p16 norm"
    dtype     the storage it is about, e.g. "bf16"
    call      invokes the launchers, forward and backward
    narrow    kernels (function names) that need no 16-byte loads and stores: few bytes, or rows too short or unaligned
    archs     where it is launched: 80 is an A100, 90 an H100
    """

    config: str
    dtype: str
    call: Callable[[], object]
    narrow: frozenset[str] = frozenset()
    archs: tuple[int, ...] = (80, 90)


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """A tensor without data for `Launch.call`."""
    return torch.empty(shape, dtype=dtype, device="meta")
