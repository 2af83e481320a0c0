"""The mutual-information penalty.  Shapes: m samples (the batch), d numbers per sample."""

import torch
from mimir_fast.kernels.nhsic import reference
from torch import Tensor

KERNELS = ("gaussian", "linear")


def nhsic(x_md: Tensor, y_me: Tensor, sigma: float = 5.0, kernel_y: str = "gaussian") -> Tensor:
    """Normalised-CCA HSIC between two sets of paired samples; grows with their dependence, below m.

    formula      K = exp(-|x_i - x_j|^2 / (2 sigma^2 d)) (or y y^T for kernel_y="linear"), S = H K H, H = I - 11^T/m,
                 R = S (S + c I)^-1, c = 1e-5 m, value = tr(R_x R_y)
    shapes       x [m,dx], y [m,dy] -> scalar; differentiable once in both
    dtypes       fp32 Gram product at least (fp64 for a linear kernel), m x m algebra in fp64; autocast is off inside
    bytes        x and y read once forward; x (y) and its gradient once more backward
    determinism  fixed order on the CPU and within one cuBLAS version
    source       Fukumizu et al., Kernel Measures of Conditional Dependence, 2007 (NOCCO); Ma et al., The HSIC Bottleneck,
                 2020, equation 4; the symmetric form is derived in docs/fidelity.md

    A batch whose kernel matrix cannot be factorised gives NaN, on the device, without an exception.
    Raises ValueError if x and y are not matrices with equally many rows, sigma <= 0, or kernel_y is unknown.
    """
    for name, rows in (("x", x_md), ("y", y_me)):
        if rows.ndim != 2 or not rows.is_floating_point():
            raise ValueError(f"{name}: expected a float matrix [m,d], got {rows.dtype} {tuple(rows.shape)}")
    if x_md.shape[0] != y_me.shape[0]:
        raise ValueError(f"y: expected {x_md.shape[0]} rows like x, got {y_me.shape[0]}")
    if not sigma > 0:
        raise ValueError(f"sigma: expected a positive kernel width, got {sigma}")
    if kernel_y not in KERNELS:
        raise ValueError(f"kernel_y: expected one of {', '.join(KERNELS)}, got {kernel_y!r}")
    with torch.autocast(x_md.device.type, enabled=False):
        return reference.NHSIC.apply(_at_least_fp32(x_md), _at_least_fp32(y_me), float(sigma), kernel_y)


def _at_least_fp32(rows: Tensor) -> Tensor:
    return rows.to(torch.promote_types(rows.dtype, torch.float32))
