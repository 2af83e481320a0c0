"""The error budget: against float64 on the same rounded inputs, twice what eager loses plus one rounding of the result."""

import torch
from torch import Tensor

# Another order of summation, where eager happens to lose nothing.
FP32_SUMS = 8 * torch.finfo(torch.float32).eps


def beyond_budget(value: Tensor, eager: Tensor, truth: Tensor) -> str:
    """What is wrong with a value; nothing ("") if it keeps to the budget.  Indices must be equal.

    The worst element and the mean both count: a global norm cannot see a dead row.  Unwritten memory is NaN and fails.
    """
    if value.shape != truth.shape:
        return f"shape {tuple(value.shape)}, expected {tuple(truth.shape)}"
    if not value.is_floating_point():
        return "" if torch.equal(value, truth) else f"{(value != truth).sum().item()} of {truth.numel()} indices differ"
    rounding = torch.finfo(value.dtype).eps * truth.abs()
    error, eager_error = (value.double() - truth).abs(), (eager.double() - truth).abs()
    floor = FP32_SUMS * truth.abs().max()
    if not (error <= 2 * eager_error.max() + rounding + floor).all():
        return f"off by {error.max().item():.3g} at worst, eager by {eager_error.max().item():.3g}"
    if not error.mean() <= 2 * eager_error.mean() + rounding.mean() + floor:
        return f"off by {error.mean().item():.3g} in the mean, eager by {eager_error.mean().item():.3g}"
    return ""
