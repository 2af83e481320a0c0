"""Costs of mlp's operators; see kernels/_shared/cost.py."""

from torch import Tensor

from mimir_fast.kernels._shared.cost import ARITHMETIC, Cost, size


def linear_gelu(results: list[Tensor], x_MD: Tensor, weight_FD: Tensor, bias_F: Tensor) -> Cost:
    """One product: its two factors and the bias read, GELU's input and output written."""
    return Cost(size(x_MD, weight_FD, bias_F, *results), _product(x_MD, len(weight_FD)), kind="GEMM")


def gelu_linear_grad(
    results: list[Tensor], grad_MD: Tensor, weight_DF: Tensor, pre_MF: Tensor, with_sums: bool
) -> Cost:
    """One product: its two factors and GELU's input read, the gradient written; per tile of rows one fp32 row of sums both."""
    # Imported here, since CPU-only installations have no Triton.
    from mimir_fast.kernels.mlp.kernel import HOPPER

    tiles = -(-len(grad_MD) // HOPPER["BLOCK_M"])
    partials = 2 * 4 * tiles * len(results[1])
    moved = size(grad_MD, weight_DF, pre_MF, *results) + partials
    return Cost(moved, _product(grad_MD, weight_DF.shape[1]), kind="GEMM")


def _product(rows_MD: Tensor, F: int) -> dict[str, float]:
    return {ARITHMETIC[rows_MD.dtype]: 2.0 * rows_MD.numel() * F}
