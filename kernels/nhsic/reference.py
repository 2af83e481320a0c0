"""nhsic in plain PyTorch, with its gradient in closed form.

With S = H K H symmetric, c = 1e-5 m and P = (S + cI)^-1 (by Cholesky), R = I - cP, so
    value          = m - c tr P_x - c tr P_y + c^2 <P_x, P_y>
    d value/d S_x  = c P_x (I - c P_y) P_x                       (symmetric; the same with x and y exchanged)
    gaussian:  W = H (d value/d S) H * K / (2 sigma^2 d),  d value/d x_i = 4 (sum_j W_ij x_j - x_i sum_j W_ij)
    linear:    d value/d x = 2 H (d value/d S) H x
Rows are centred first: that leaves their distances as they are and makes the rounding errors smaller.
"""

import torch
from torch import Tensor

RIDGE = 1e-5


def center_rows(x_md: Tensor) -> Tensor:
    """Subtract the mean over samples."""
    return x_md - x_md.mean(dim=0, keepdim=True)


def double_center(k_mm: Tensor) -> Tensor:
    """H K H with H = I - 11^T/m, for any square K."""
    return k_mm - k_mm.mean(0, keepdim=True) - k_mm.mean(1, keepdim=True) + k_mm.mean()


def kernel_matrix(centered_md: Tensor, sigma: float, kernel: str) -> Tensor:
    """[m,d] centred rows -> [m,m] kernel in float64 (the Gram product itself runs in the rows' dtype)."""
    gram_mm = (centered_md @ centered_md.T).double()
    if kernel == "linear":
        return gram_mm
    norms_m = gram_mm.diagonal()
    # Rounding can make a distance negative.
    distances_mm = (norms_m[:, None] + norms_m[None, :] - 2 * gram_mm).clamp_min(0)
    return torch.exp(-distances_mm / (2 * sigma**2 * centered_md.shape[1]))


def ridge_inverse(k_mm: Tensor) -> Tensor:
    """P = (H K H + c I)^-1; all of it is NaN where the factorisation fails."""
    m = k_mm.shape[0]
    ridged_mm = double_center(k_mm) + RIDGE * m * torch.eye(m, dtype=k_mm.dtype, device=k_mm.device)
    factor_mm, info = torch.linalg.cholesky_ex(ridged_mm)
    return torch.where(info == 0, torch.cholesky_inverse(factor_mm), torch.nan)


def rows_gradient(centered_md: Tensor, k_mm: Tensor, p_self: Tensor, p_other: Tensor, sigma: float, kernel: str):
    """d value / d rows [m,d] from both ridge inverses; centred rows suffice because the weights' rows sum to zero."""
    m, d = centered_md.shape
    c = RIDGE * m
    weights_mm = double_center(c * (p_self @ p_self - c * (p_self @ p_other @ p_self)))
    if kernel == "linear":
        return 2 * weights_mm @ centered_md
    # K is fp64 and the rows may be fp32: the last product is the only large one, and runs in the rows' dtype.
    weights_mm = weights_mm * k_mm / (2 * sigma**2 * d)
    laplacian_mm = weights_mm - torch.diag(weights_mm.sum(dim=1))
    return 4 * laplacian_mm.to(centered_md.dtype) @ centered_md


def side(rows_md: Tensor, sigma: float, kernel: str) -> tuple[Tensor, Tensor, Tensor]:
    """Rows [m,d] -> the same centred, their kernel matrix and their ridge inverse."""
    # The gradient is a difference of large terms, and few columns (labels, logits) make fp64 cheap.
    centred_md = center_rows(rows_md.double() if kernel == "linear" else rows_md)
    k_mm = kernel_matrix(centred_md, sigma, kernel)
    return centred_md, k_mm, ridge_inverse(k_mm)


class NHSIC(torch.autograd.Function):
    """x [m,dx], y [m,dy] (fp32 or fp64), or y's ridge inverse [m,m], with kernel_y None -> scalar of x's dtype."""

    @staticmethod
    def forward(ctx, x_md: Tensor, y_me: Tensor, sigma: float, kernel_y: str | None) -> Tensor:
        m = x_md.shape[0]
        c = RIDGE * m
        ctx.sigma, ctx.kernel_y, ctx.dtype_y = sigma, kernel_y, y_me.dtype
        x_md, kx, px = side(x_md, sigma, "gaussian")
        rows_y, ky, py = side(y_me, sigma, kernel_y) if kernel_y else (None, None, y_me)
        ctx.save_for_backward(x_md, rows_y, kx, ky, px, py)
        return (m - c * px.trace() - c * py.trace() + c**2 * (px * py).sum()).to(x_md.dtype)

    # Backward works on saved tensors outside autograd: without this a second derivative would be silently wrong.
    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_value: Tensor):
        x_md, y_me, kx, ky, px, py = ctx.saved_tensors
        grad_x = grad_y = None
        if ctx.needs_input_grad[0]:
            grad_x = grad_value * rows_gradient(x_md, kx, px, py, ctx.sigma, "gaussian")
        if ctx.needs_input_grad[1]:
            grad_y = (grad_value * rows_gradient(y_me, ky, py, px, ctx.sigma, ctx.kernel_y)).to(ctx.dtype_y)
        return grad_x, grad_y, None, None
