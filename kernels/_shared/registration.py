"""Registration: how an operation checks its arguments, chooses its implementation, and becomes a torch operator."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.library import CustomOpDef

IMPLS = ("auto", "triton", "reference")
# The element types that the kernels read and write.
STORAGE = (torch.float32, torch.float16, torch.bfloat16, torch.uint8)


def choose(impl: str, tensor: Tensor) -> str:
    """Resolve impl: "auto" is "triton" for CUDA tensors and "reference" elsewhere.

    "triton" on a CPU tensor is for tests: it runs inside Triton's interpreter and fails outside of it.
    Raises ValueError for an unknown impl.
    """
    if impl not in IMPLS:
        raise ValueError(f"impl: expected one of {', '.join(IMPLS)}, got {impl!r}")
    if impl == "auto":
        return "triton" if tensor.is_cuda else "reference"
    return impl


def check_floats(device: torch.device, **tensors: Tensor) -> None:
    """Raise ValueError, naming the tensor, unless all are floating-point and on this device."""
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            raise ValueError(f"{name}: expected a float type, got {tensor.dtype}")
        _check_device(device, name, tensor)


def check_images(device: torch.device, images: Tensor) -> None:
    """Raise ValueError unless the images are float or uint8 and on this device."""
    if not images.is_floating_point() and images.dtype != torch.uint8:
        raise ValueError(f"images: expected float or uint8, got {images.dtype}")
    _check_device(device, "images", images)


def check_indices(device: torch.device, **tensors: Tensor) -> None:
    """Raise ValueError, naming the tensor, unless all are int64 and on this device."""
    for name, tensor in tensors.items():
        if tensor.dtype != torch.int64:
            raise ValueError(f"{name}: expected int64, got {tensor.dtype}")
        _check_device(device, name, tensor)


def _check_device(device: torch.device, name: str, tensor: Tensor) -> None:
    if tensor.device != device:
        raise ValueError(f"{name}: expected on {device} like the other arguments, got {tensor.device}")


def check_storage(**tensors: Tensor) -> None:
    """Raise ValueError, naming the tensor, unless its dtype is one that the kernels read: fp32, fp16, bf16 or uint8."""
    for name, tensor in tensors.items():
        if tensor.dtype not in STORAGE:
            allowed = "fp32, fp16, bf16 or uint8; impl='reference' takes every dtype"
            raise ValueError(f"{name}: the triton implementation takes {allowed}, got {tensor.dtype}")


def register(name: str, schema: str, launch: Callable, fake: Callable) -> CustomOpDef:
    """Define the torch operator mimir_fast::name, which torch.compile does not look into.

    launch    runs the kernels, on CUDA tensors; on CPU tensors inside Triton's interpreter
    fake      gives results of the same shapes, strides and dtypes without computing, for tracing
    """

    def launch_there(*arguments):
        tensors = (argument for argument in arguments if isinstance(argument, Tensor))
        # Triton launches on the current device, which need not be the one that holds the tensors.
        with torch.cuda.device_of(next(tensors)):
            return launch(*arguments)

    op = torch.library.custom_op(
        f"mimir_fast::{name}", launch_there, mutates_args=(), device_types="cuda", schema=schema
    )
    # On CPU tensors for tests only, in Triton's interpreter: `choose` gives them the reference.
    op.register_kernel("cpu")(launch)
    op.register_fake(fake)
    return op
