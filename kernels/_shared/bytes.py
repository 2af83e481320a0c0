"""Images in bytes: what their pixels are as floats, without Triton."""

import torch
from torch import Tensor


def as_floats(images: Tensor) -> Tensor:
    """uint8 images as fp32 in [0,1], bit-equal to torchvision's ToTensor; floats as they are."""
    if images.dtype != torch.uint8:
        return images
    # A divisor on the device: CUDA would turn division by a Python number into a less exact multiplication.
    return images.to(torch.float32).div_(torch.full((), 255.0, device=images.device))


def float_of(images: Tensor) -> torch.dtype:
    """The dtype of what is made of images: theirs, or fp32 where they are bytes."""
    return images.dtype if images.is_floating_point() else torch.float32
