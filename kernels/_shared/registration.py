"""Registration: how an operation checks its arguments, chooses its implementation, and becomes a torch operator."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.autograd.function import once_differentiable
from torch.library import Library

from mimir_fast.kernels._shared.direct import call_directly

# Alive as long as the operators are.
LIBRARY = Library("mimir_fast", "FRAGMENT")
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


def register(
    name: str,
    schema: str,
    launch: Callable,
    fake: Callable,
    gradient: tuple[Callable, Callable] | None = None,
) -> OpOverload:
    """Define the torch operator mimir_fast::name, which torch.compile does not look into.

    launch    runs the kernels, on CUDA tensors; on CPU tensors inside Triton's interpreter
    fake      gives results of the same shapes, strides and dtypes without computing, for tracing
    gradient  save(ctx, inputs, output), which keeps what the backward pass needs, and backward(ctx, *upstream), which gives one
              gradient or None per input; None: no gradient.  There is no second derivative

    A differentiable operator is a function of autograd around the overload `kernel`, and a composite that tracing sees through:
    compiled code calls the overload, with nothing of Python's autograd around it.
    """
    if not gradient:
        return _define(name, "default", schema, launch, fake)
    # The first of two overloads of one schema is what the operator's name alone means.
    LIBRARY.define(name + schema, tags=torch.Tag.pt2_compliant_tag)
    kernel = _define(name, "kernel", schema, launch, fake)
    LIBRARY.impl(name, _with_gradient(name, kernel, *gradient), "CompositeImplicitAutograd")
    return getattr(torch.ops.mimir_fast, name).default


def _define(name: str, overload: str, schema: str, launch: Callable, fake: Callable) -> OpOverload:
    """An operator without a gradient."""
    full = name if overload == "default" else f"{name}.{overload}"
    LIBRARY.define(full + schema, tags=torch.Tag.pt2_compliant_tag)
    LIBRARY.impl(full, launch, "CUDA")
    # On CPU tensors for tests only, in Triton's interpreter: `choose` gives them the reference.
    LIBRARY.impl(full, launch, "CPU")
    torch.library.register_fake(f"mimir_fast::{full}", fake, lib=LIBRARY)
    registered = getattr(getattr(torch.ops.mimir_fast, name), overload)
    call_directly(registered, launch)
    return registered


def _with_gradient(name: str, kernel: OpOverload, save: Callable, backward: Callable) -> Callable:
    """kernel as a function of autograd, where a gradient is asked for."""
    first_derivative = once_differentiable(backward)

    def forward(ctx, *inputs):
        output = kernel(*inputs)
        save(ctx, inputs, output)
        return output

    def gradients(ctx, *upstream):
        # For create_graph: only where these require a gradient is a second derivative refused, and not left out.
        if torch.is_grad_enabled():
            upstream = tuple(None if grad is None else grad.detach().requires_grad_() for grad in upstream)
        return first_derivative(ctx, *upstream)

    methods = {"forward": staticmethod(forward), "backward": staticmethod(gradients)}
    function: Any = type(name, (torch.autograd.Function,), methods)

    def call(*inputs):
        if torch.is_grad_enabled() and any(isinstance(value, Tensor) and value.requires_grad for value in inputs):
            return function.apply(*inputs)
        return kernel(*inputs)

    return call
