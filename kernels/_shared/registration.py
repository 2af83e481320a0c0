"""How an operation chooses its implementation, and how a launcher becomes a torch operator."""

from collections.abc import Callable

import torch
from torch import Tensor

IMPLS = ("auto", "triton", "reference")
STORAGE = (torch.float32, torch.float16, torch.bfloat16, torch.uint8)  # the kernels' element types


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


def check_floats(device: torch.device, **tensors: Tensor) -> None:
    """Every implementation wants floating-point tensors on one device; raises ValueError naming the one that is not."""
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            raise ValueError(f"{name}: expected a float type, got {tensor.dtype}")
        _check_device(device, name, tensor)


def check_images(device: torch.device, images: Tensor) -> None:
    """Images are floats or uint8; raises ValueError otherwise."""
    if not images.is_floating_point() and images.dtype != torch.uint8:
        raise ValueError(f"images: expected float or uint8, got {images.dtype}")
    _check_device(device, "images", images)


def check_indices(device: torch.device, **tensors: Tensor) -> None:
    """Index tables are int64 on the other arguments' device; raises ValueError naming the one that is not."""
    for name, tensor in tensors.items():
        if tensor.dtype != torch.int64:
            raise ValueError(f"{name}: expected int64, got {tensor.dtype}")
        _check_device(device, name, tensor)


def _check_device(device: torch.device, name: str, tensor: Tensor) -> None:
    if tensor.device != device:
        raise ValueError(f"{name}: expected on {device} like the other arguments, got {tensor.device}")


def check_storage(**tensors: Tensor) -> None:
    """The kernels' element types are fp32, fp16, bf16 and uint8; raises ValueError naming the tensor."""
    for name, tensor in tensors.items():
        if tensor.dtype not in STORAGE:
            allowed = "fp32, fp16, bf16 or uint8; impl='reference' takes every dtype"
            raise ValueError(f"{name}: the triton implementation takes {allowed}, got {tensor.dtype}")


def register(name: str, schema: str, launch: Callable, fake: Callable):
    """The operator mimir_fast::name: `launch` on CUDA (on the CPU for the interpreter), `fake` for shapes when tracing."""

    def launch_there(*arguments):
        tensors = (argument for argument in arguments if isinstance(argument, Tensor))
        with torch.cuda.device_of(next(tensors)):  # Triton launches on the current device, wherever the tensors are
            return launch(*arguments)

    op = torch.library.custom_op(
        f"mimir_fast::{name}", launch_there, mutates_args=(), device_types="cuda", schema=schema
    )
    op.register_kernel("cpu")(launch)
    op.register_fake(fake)
    return op
