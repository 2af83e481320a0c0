"""The mutual-information penalty.  Shapes: m samples (the batch), d numbers per sample."""

import torch
from torch import Tensor

from mimir_fast.kernels._shared.registration import check_floats, check_storage, choose
from mimir_fast.kernels.nhsic import reference

KERNELS = ("gaussian", "linear")
# Samples: a program holds a row of an [m,m] matrix in registers, and longer ones spill.
LARGEST = 8192


def nhsic(x_md: Tensor, y_me: Tensor, sigma: float = 5.0, kernel_y: str = "gaussian", impl: str = "auto") -> Tensor:
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
    impl: "triton" (kernel_y="gaussian" in storage up to 32 bits, m <= 8192), "reference" or "auto" (triton where it can
    on CUDA).
    Raises ValueError if x and y are not matrices with equally many rows, sigma <= 0, kernel_y or impl is unknown, or triton
    is asked for what it does not offer.
    """
    for name, rows in (("x", x_md), ("y", y_me)):
        if rows.ndim != 2 or not rows.is_floating_point():
            raise ValueError(f"{name}: expected a float matrix [m,d], got {rows.dtype} {tuple(rows.shape)}")
    if x_md.shape[0] != y_me.shape[0]:
        raise ValueError(f"y: expected {x_md.shape[0]} rows like x, got {y_me.shape[0]}")
    check_floats(x_md.device, y=y_me)
    if not sigma > 0:
        raise ValueError(f"sigma: expected a positive kernel width, got {sigma}")
    if kernel_y not in KERNELS:
        raise ValueError(f"kernel_y: expected one of {', '.join(KERNELS)}, got {kernel_y!r}")
    if impl == "auto" and (kernel_y != "gaussian" or len(x_md) > LARGEST):
        impl = "reference"
    if choose(impl, x_md) == "triton":
        if kernel_y != "gaussian":
            raise ValueError(f'kernel_y: impl="triton" computes gaussian only, got {kernel_y!r}')
        if len(x_md) > LARGEST:
            raise ValueError(f'x: impl="triton" takes up to {LARGEST} rows, got {len(x_md)}')
        # Imported here, since CPU-only installations have no Triton.
        from mimir_fast.kernels.nhsic import kernel

        check_storage(x=x_md, y=y_me)
        return kernel.nhsic(x_md, y_me, float(sigma))[0]
    # Under autocast the Gram product would run in 16 bits.
    with torch.autocast(x_md.device.type, enabled=False):
        return reference.NHSIC.apply(_at_least_fp32(x_md), _at_least_fp32(y_me), float(sigma), kernel_y)


def _at_least_fp32(rows: Tensor) -> Tensor:
    return rows.to(torch.promote_types(rows.dtype, torch.float32))
