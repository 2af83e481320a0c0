"""nhsic: the penalty between latent and images, and the latent's gradient.  Recipes have both in fp32.

A rival that never stores the kernel matrices, as KeOps does, cannot be: their inverses are needed.
"""

import torch
from torch import Tensor

from bench.kernels.suite import Size
from bench.simulated_gpu import marker
from mimir_fast.kernels import nhsic
from mimir_fast.kernels.nhsic.reference import RIDGE, center_rows, ridge_inverse
from tests.support.cases import DTYPES, Case

CLOSE = {"fp32": 2e-3, "fp16": 2e-2, "bf16": 2e-2}  # relative, in the L2 norm


def by_cdist(x_md: Tensor, y_me: Tensor, sigma: float = 5.0) -> Tensor:
    """Kernel matrices from torch.cdist, differentiated by autograd; the reference's inverses in float64."""
    m = len(x_md)
    inverses = []
    for rows in (x_md, y_me):
        rows = center_rows(rows.to(torch.promote_types(rows.dtype, torch.float32)))
        distances_mm = torch.cdist(rows, rows).double().square()
        inverses.append(ridge_inverse(torch.exp(-distances_mm / (2 * sigma**2 * rows.shape[1]))))
    px, py = inverses
    c = RIDGE * m
    return (m - c * px.trace() - c * py.trace() + c**2 * (px * py).sum()).float()


def cases(size: Size, dtype: str) -> list[Case]:
    d, e = (1 + size.K) * size.D, 3 * size.side**2

    def draw(device: torch.device) -> dict:
        rows = {"x_md": torch.randn(size.B, d, device=device), "y_me": torch.rand(size.B, e, device=device)}
        rows = {name: row.to(DTYPES[dtype]) for name, row in rows.items()}
        return {**rows, "x_md": rows["x_md"].requires_grad_()}

    def close(value: Tensor, eager: Tensor, truth: Tensor) -> str:
        """The m x m algebra is fp32 in the kernel and float64 in the reference: eager is no yardstick."""
        error = ((value.double() - truth).norm() / truth.norm()).item()
        return "" if error <= CLOSE[dtype] else f"off by {error:.3g} relative, {CLOSE[dtype]:g} is allowed"

    shape = {"m": size.B, "d": d, "e": e}
    rivals = {} if marker() else {"cdist": by_cdist}  # a simulated GPU has no float64 solver for Cholesky's gradient
    return [Case("nhsic", shape, dtype, draw, nhsic, rivals, judge=close, usual="fp32")]
