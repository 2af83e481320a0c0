"""How an operation chooses its implementation, and how a launcher becomes a torch operator."""

from collections.abc import Callable

import torch
from torch import Tensor

IMPLS = ("auto", "triton", "reference")
STORAGE = (torch.float32, torch.float16, torch.bfloat16, torch.uint8)


def choose(impl: str, tensor: Tensor) -> str:
    """ "triton" or "reference"; auto is triton for CUDA tensors, the reference elsewhere.

    "triton" on a CPU tensor is for tests: it runs inside Triton's interpreter and fails outside of it.
    Raises ValueError for any other word.
    """
    if impl not in IMPLS:
        raise ValueError(f"impl: expected one of {', '.join(IMPLS)}, got {impl!r}")
    if impl == "auto":
        return "triton" if tensor.is_cuda else "reference"
    return impl


def check_storage(**tensors: Tensor) -> None:
    """The kernels' element types are fp32, fp16, bf16 and uint8, all on one device; raises ValueError naming the tensor."""
    device = next(iter(tensors.values())).device
    for name, tensor in tensors.items():
        if tensor.dtype not in STORAGE:
            allowed = "fp32, fp16, bf16 or uint8; impl='reference' takes every dtype"
            raise ValueError(f"{name}: the triton implementation takes {allowed}, got {tensor.dtype}")
        if tensor.device != device:
            raise ValueError(f"{name}: expected on {device} like the first argument, got {tensor.device}")


def register(name: str, schema: str, launch: Callable, fake: Callable):
    """The operator mimir_fast::name: `launch` on CUDA (on the CPU for the interpreter), `fake` for shapes when tracing."""
    op = torch.library.custom_op(f"mimir_fast::{name}", launch, mutates_args=(), device_types="cuda", schema=schema)
    op.register_kernel("cpu")(launch)
    op.register_fake(fake)
    return op
