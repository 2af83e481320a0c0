"""The mutual-information penalty.  Shapes: m samples (the batch), d numbers per sample."""

from typing import NamedTuple

import torch
from torch import Tensor

from mimir_fast.kernels._shared.registration import check_floats, check_storage, choose
from mimir_fast.kernels.nhsic import reference

KERNELS = ("gaussian", "linear")
# Samples: a program holds a row of an [m,m] matrix in registers, and longer ones spill.
LARGEST = 8192


class Inverse(NamedTuple):
    """All that nhsic needs of y where y gets no gradient: the ridge inverse [m,m], as one of the implementations has it."""

    p_mm: Tensor
    impl: str


def nhsic(
    x_md: Tensor, y_me: Tensor | Inverse, sigma: float = 5.0, kernel_y: str = "gaussian", impl: str = "auto"
) -> Tensor:
    """Normalised-CCA HSIC between two sets of paired samples; grows with their dependence, below m.

    formula      K = exp(-|x_i - x_j|^2 / (2 sigma^2 d)) (or y y^T for kernel_y="linear"), S = H K H, H = I - 11^T/m,
                 R = S (S + c I)^-1, c = 1e-5 m, value = tr(R_x R_y)
    shapes       x [m,dx], y [m,dy] -> scalar; differentiable once in both
    dtypes       any float storage, fp32 Gram product at least (triton: 3 x tf32, whatever allow_tf32 says); m x m algebra in
                 fp64 (triton: fp32); the value in fp32 at least; autocast is off inside
    bytes        x and y read once from memory and once per tile pair from cache; backward: the rows that need a gradient read
                 once from memory and once per row tile from cache, their gradient written once; [m,m] matrices besides
    determinism  fixed order, on the CPU and within one cuBLAS and cuSOLVER version; parts of a sum depend on m and d only
    source       Fukumizu et al., Kernel Measures of Conditional Dependence, 2007 (NOCCO); Ma et al., The HSIC Bottleneck,
                 2020, equation 4; the symmetric form is derived in docs/fidelity.md

    A batch whose kernel matrix cannot be factorised gives NaN, on the device, without an exception.
    y may also be what ridge_inverse has made of it, with its sigma, kernel_y and impl.
    impl: "triton" (kernel_y="gaussian" in storage up to 32 bits, m <= 8192), "reference" or "auto" (triton where it can
    on CUDA).
    Raises ValueError if x and y are not matrices with equally many rows, sigma <= 0, kernel_y or impl is unknown, or triton
    is asked for what it does not offer.
    """
    given = isinstance(y_me, Inverse)
    other, impl = (y_me.p_mm, y_me.impl) if isinstance(y_me, Inverse) else (y_me, impl)
    impl = _chosen({"x": x_md} if given else {"x": x_md, "y": other}, sigma, kernel_y, impl)
    if x_md.shape[0] != other.shape[0]:
        raise ValueError(f"y: expected {x_md.shape[0]} rows like x, got {other.shape[0]}")
    if impl == "triton":
        # Imported here, since CPU-only installations have no Triton.
        from mimir_fast.kernels.nhsic import kernel

        return (kernel.nhsic_given if given else kernel.nhsic)(x_md, other, float(sigma))[0]
    # Under autocast the Gram product would run in 16 bits.
    with torch.autocast(x_md.device.type, enabled=False):
        return reference.NHSIC.apply(
            _at_least_fp32(x_md), _at_least_fp32(other), float(sigma), None if given else kernel_y
        )


def ridge_inverse(y_me: Tensor, sigma: float = 5.0, kernel_y: str = "gaussian", impl: str = "auto") -> Inverse:
    """The part of nhsic that depends on y alone, for `nhsic` to take in y's place: computed before x is there.

    Arguments and errors are those of nhsic.
    """
    impl = _chosen({"y": y_me}, sigma, kernel_y, impl)
    y_me = y_me.detach()
    if impl == "triton":
        from mimir_fast.kernels.nhsic import kernel

        return Inverse(kernel.nhsic_side(y_me, float(sigma)), impl)
    with torch.autocast(y_me.device.type, enabled=False):
        return Inverse(reference.side(_at_least_fp32(y_me), float(sigma), kernel_y)[2], impl)


def _chosen(rows: dict[str, Tensor], sigma: float, kernel_y: str, impl: str) -> str:
    """The implementation, for arguments that it takes; raises ValueError naming one that does not fit."""
    first = next(iter(rows.values()))
    for name, matrix in rows.items():
        if matrix.ndim != 2 or not matrix.is_floating_point():
            raise ValueError(f"{name}: expected a float matrix [m,d], got {matrix.dtype} {tuple(matrix.shape)}")
    check_floats(first.device, **rows)
    if not sigma > 0:
        raise ValueError(f"sigma: expected a positive kernel width, got {sigma}")
    if kernel_y not in KERNELS:
        raise ValueError(f"kernel_y: expected one of {', '.join(KERNELS)}, got {kernel_y!r}")
    if impl == "auto" and (kernel_y != "gaussian" or len(first) > LARGEST):
        impl = "reference"
    impl = choose(impl, first)
    if impl == "triton":
        if kernel_y != "gaussian":
            raise ValueError(f'kernel_y: impl="triton" computes gaussian only, got {kernel_y!r}')
        if len(first) > LARGEST:
            raise ValueError(f'x: impl="triton" takes up to {LARGEST} rows, got {len(first)}')
        check_storage(**rows)
    return impl


def _at_least_fp32(rows: Tensor) -> Tensor:
    return rows.to(torch.promote_types(rows.dtype, torch.float32))
