"""Costs of add_layer_norm's operators; see kernels/_shared/cost.py."""

from torch import Tensor

from mimir_fast.kernels._shared.cost import Cost, size


def add_layer_norm_grad(results: list[Tensor], *arguments) -> Cost:
    """Arguments and results once; per group of rows a partial sum for each column sum that is asked for, written and read."""
    # Imported here, since CPU-only installations have no Triton.
    from mimir_fast.kernels.add_layer_norm.kernel import groups

    _, _, _, statistics, weight_D = arguments[:5]
    sums = sum(len(column_sum) for column_sum in results[2:])
    partials = 2 * 4 * sums * groups(statistics.shape[1], len(weight_D), sums > 0)
    return Cost(size(*(a for a in arguments if isinstance(a, Tensor)), *results) + partials)
