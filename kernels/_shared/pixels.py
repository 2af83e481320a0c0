"""Pixels of images in floats or bytes: a Triton building block, no operation of its own."""

import triton
import triton.language as tl

# 1/255 = 2^-8 + 2^-16 + ...: its first three terms and the next two.
HIGH, LOW = tl.constexpr(0x010101 * 2.0**-24), tl.constexpr(0x0101 * 2.0**-40)


@triton.jit
def pixels(images, offsets, exists):
    """fp32 pixels of float images, or of uint8 images divided by 255, to the last bit what torch's division gives."""
    values = tl.load(images + offsets, mask=exists, other=0).to(tl.float32)
    # Decided when compiling.
    if images.dtype.element_ty == tl.uint8:
        # Both products are exact, so that the sum is rounded once whether or not it is fused.  A division would take a call.
        values = values * HIGH + values * LOW
    return values
