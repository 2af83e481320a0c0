"""Mutual-information penalties: dependence between latent and images.  Shapes: m samples, d numbers per sample."""

from collections.abc import Callable

import torch
from torch import Tensor

from mimir_fast.config.choices import PENALTIES
from mimir_fast.kernels import nhsic, ridge_inverse
from mimir_fast.kernels._shared.bytes import as_floats
from mimir_fast.kernels.nhsic.op import Inverse

__all__ = ["bandwidth", "compared", "nhsic", "penalty_value", "renyi_entropy", "renyi_mi", "squared_distances"]

# Samples whose distances decide the bandwidth, as in the original.
BANDWIDTH_ROWS = 10


def compared(
    kind: str,
    images: Tensor,
    adv_images: Tensor,
    kernels: str = "auto",
    gather: Callable[[Tensor], Tensor] | None = None,
) -> Tensor | Inverse:
    """What penalty_value compares a latent with, of images and adv_images [B,C,H,W], floats or uint8: the adversarial ones for
    hsic, the clean ones for dib_mi and renyi2.

    gather   of this process's images [B,...] those of all
    Returns rows [m,d], or of hsic the half of its work that these suffice for.
    """
    chosen = adv_images if kind == "hsic" else images
    rows = as_floats(chosen if gather is None else gather(chosen)).flatten(1)
    return ridge_inverse(rows, impl=kernels) if kind == "hsic" else rows


def penalty_value(kind: str, latent: Tensor, x: Tensor | Inverse, kernels: str = "auto") -> Tensor:
    """The penalty without its weight: latent [B,T,D] and x, from `compared` -> scalar, differentiable in the latent.

    kind      hsic; dib_mi (Rényi order 1.01) and renyi2 (order 2)
    kernels   implementation of hsic (see nhsic); the others have one, in plain PyTorch
    Raises ValueError for an unknown kind.
    """
    z = latent.flatten(1)
    if kind == "hsic":
        return nhsic(z, x, impl=kernels)
    if kind in ("dib_mi", "renyi2") and isinstance(x, Tensor):
        # These orders, and clean images, as in the original (1.01: Rényi's entropy close to Shannon's).
        return renyi_mi(x, z, alpha=1.01 if kind == "dib_mi" else 2.0)
    raise ValueError(f"mi_train: expected one of {', '.join(PENALTIES)}, got {kind!r}")


def renyi_mi(
    x_md: Tensor, z_me: Tensor, alpha: float = 1.01, sigma_x: float | None = None, sigma_z: float | None = None
) -> Tensor:
    """Matrix-based Rényi mutual information in bits, I = H(Kx) + H(Kz) - H(Kx * Kz), for any number of samples.

    x [m,dx], z [m,dz] -> scalar, differentiable in both.  Kernel exp(-|a-b|^2 / sigma); bandwidths default to
    `bandwidth` (constants, no gradient).  alpha = 2 needs no eigenvalues.  All m x m algebra is in float64.
    Source: Giraldo et al., Measures of Entropy from Data Using Infinitely Divisible Kernels, 2015; Yu et al., Deep
    Deterministic Information Bottleneck, 2021.  Raises ValueError if shapes disagree, alpha <= 0 or alpha = 1.
    """
    if x_md.ndim != 2 or z_me.ndim != 2 or x_md.shape[0] != z_me.shape[0]:
        raise ValueError(
            f"z: expected two matrices with equally many rows, got {tuple(x_md.shape)}, {tuple(z_me.shape)}"
        )
    if not alpha > 0 or alpha == 1:
        raise ValueError(f"alpha: expected a positive Rényi order other than 1, got {alpha}")
    # Under autocast the Gram products would run in 16 bits.
    with torch.autocast(x_md.device.type, enabled=False):
        kx = _normalised_kernel(x_md, sigma_x)
        kz = _normalised_kernel(z_me, sigma_z)
        # A product of kernels of trace 1 has a smaller trace; entropies are of trace 1, hence the division below.
        joint = kx * kz
        hx, hz, hxz = (renyi_entropy(k, alpha) for k in (kx, kz, joint / _trace(joint)))
        return (hx + hz - hxz).to(torch.promote_types(z_me.dtype, torch.float32))


def renyi_entropy(k_mm: Tensor, alpha: float) -> Tensor:
    """Matrix-based Rényi entropy in bits, log2(sum_i |eigenvalue_i|^alpha) / (1 - alpha), of a symmetric [m,m] of trace 1.

    NaN if an entry is NaN or infinite.
    """
    # The sum of the squared eigenvalues is that of the squared entries.
    if alpha == 2:
        return -torch.log2(k_mm.square().sum())
    # The eigenvalue solver raises an exception on NaN, for which the host would have to wait.
    finite = k_mm.isfinite().all()
    eigenvalues = torch.linalg.eigvalsh(torch.where(finite, k_mm, 0))
    # abs: rounding makes the smallest eigenvalues negative, whose powers would be NaN.
    entropy = torch.log2(eigenvalues.abs().pow(alpha).sum()) / (1 - alpha)
    return torch.where(finite, entropy, torch.nan)


def bandwidth(x_md: Tensor) -> Tensor:
    """Default bandwidth: mean Euclidean distance from the first ten samples to all samples, themselves included."""
    return _rule(squared_distances(x_md))


def _rule(distances_mm: Tensor) -> Tensor:
    # Detached: at 0, on the diagonal, a square root has an infinite gradient.
    return distances_mm.detach()[:BANDWIDTH_ROWS].sqrt().mean()


def _normalised_kernel(x_md: Tensor, sigma: float | None) -> Tensor:
    distances = squared_distances(x_md)
    # Divided by the bandwidth itself, not by its square: the original's form of the Gaussian kernel.
    kernel = torch.exp(-distances / (_rule(distances) if sigma is None else sigma))
    return kernel / _trace(kernel)


def _trace(k_mm: Tensor) -> Tensor:
    # The gradient of Tensor.trace makes the host wait for a GPU.
    return k_mm.diagonal().sum()


def squared_distances(x_md: Tensor) -> Tensor:
    """Squared Euclidean distances of samples: [m,d] -> [m,m] float64, exactly zero on the diagonal."""
    # Centring leaves distances as they are and makes the rounding errors of the Gram product smaller, which runs in fp32 at
    # least.
    x_md = x_md.to(torch.promote_types(x_md.dtype, torch.float32))
    x_md = x_md - x_md.mean(dim=0, keepdim=True)
    gram = (x_md @ x_md.T).double()
    norms = gram.diagonal()
    return (norms[:, None] + norms[None, :] - 2 * gram).clamp_min(0)
