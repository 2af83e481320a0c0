"""GELU and its derivative in Triton, in fp32, each with one exponential and one reciprocal square root."""

import triton
import triton.language as tl


@triton.jit
def gelu(h):
    """h Phi(h), Phi the normal distribution."""
    # Past 16 the exponential is 0; unlike infinity, 16 times 0 is 0, so that gelu(inf) is inf.
    return h * _by_sign(h, tl.minimum(tl.abs(h), 16.0), 0.0)


@triton.jit
def gelu_slope(h):
    """Phi(h) + h phi(h), phi the density; NaN where h is infinite, as h phi(h) is in arithmetic."""
    # -phi(a) a, for a = -h, has the exponential in common with Phi(-a): its other factor joins the polynomial's constant.
    return _by_sign(h, tl.abs(h), 0.3989422804014327)


@triton.jit
def _by_sign(h, a, density: tl.constexpr):
    """y = exp(-a^2/2) (1/2 - a (r(t) + density)), t = 1 / (1 + 0.305 a), where h is negative, elsewhere 1 - y; a is |h|.

    With density 0 that is Phi(h).  Linear programming gave r's coefficients: of all polynomials of degree 5 the least maximum
    over 0 <= a <= 13.2 of |1/2 - a r(t) - m| max(exp(-a^2/2) max(a, 1), 6e-7 / m), where m = Phi(-a) exp(a^2/2), 1.5e-8.  The
    slope 0.305 is one of those where rounding in fp32 adds least.  The error vanishes at 0.
    """
    # A root and its square are two instructions, a division is eight.
    root = tl.math.rsqrt(1.0 + 0.305 * a)
    t = root * root
    r = -0.04823543 * t + 0.16674302
    r = r * t - 0.02277675
    r = r * t + 0.15993435
    r = r * t + 0.14233691
    r = r * t + (0.00094034 + density)
    # tl.exp would take four instructions more, for results below 1e-38.
    y = (0.5 - a * r) * tl.exp2(h * -0.7213475204444817 * h)
    return tl.where(h < 0, y, 1.0 - y)
