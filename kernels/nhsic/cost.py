"""Costs of nhsic's operators; see kernels/_shared/cost.py."""

from torch import Tensor

from mimir_fast.kernels._shared.cost import Cost, size

# The products are three tf32 products each.
PRODUCTS = 3
# [m,m] fp32 matrices of one side that are written and read: kernel, ridged, factor, inverse, P.
SQUARES = 5


def nhsic(results: list[Tensor], x_md: Tensor, y_me: Tensor, sigma: float) -> Cost:
    """Both sides."""
    return _sides(x_md, y_me)


def nhsic_side(results: list[Tensor], y_me: Tensor, sigma: float) -> Cost:
    return _sides(y_me)


def nhsic_given(results: list[Tensor], x_md: Tensor, p_mm: Tensor, sigma: float) -> Cost:
    return _sides(x_md)


def _sides(*sides: Tensor) -> Cost:
    """Each: rows once, their shift written and read, [m,m] matrices; half a Gram product, two dense solves."""
    moved, flops, m = 0, 0.0, len(sides[0])
    for rows in sides:
        moved += size(rows) + 2 * 4 * rows.shape[1] + SQUARES * 2 * 4 * m * m
        # Symmetric: half of 2 m m d.
        flops += PRODUCTS * m * rows.numel()
    return Cost(moved, {"tf32": flops}, len(sides) * [("linalg_cholesky_ex", m), ("cholesky_inverse", m)])


def nhsic_grad(results: list[Tensor], grad: Tensor, rows_md: Tensor, *arguments) -> Cost:
    """Rows and shift once, the gradient once, k and both P; two [m,m] products and one with the rows."""
    m, d = rows_md.shape
    moved = size(rows_md, *arguments[:4], *results) + SQUARES * 2 * 4 * m * m
    return Cost(moved, {"tf32": PRODUCTS * (2 * 2.0 * m**3 + 2.0 * m * m * d)})
