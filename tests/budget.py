"""The error budget: against float64 on the same rounded inputs, twice what eager loses plus one rounding of the result."""

import torch
from torch import Tensor

FP32_SUMS = 8 * torch.finfo(torch.float32).eps  # another order of summation, where eager happens to lose nothing


def assert_within_budget(value: Tensor, eager: Tensor, truth: Tensor, name: str = ""):
    """The worst element and the mean both count: a global norm cannot see a dead row.  Unwritten memory is NaN and fails."""
    assert value.shape == truth.shape, name
    rounding = torch.finfo(value.dtype).eps * truth.abs()
    error, eager_error = (value.double() - truth).abs(), (eager.double() - truth).abs()
    floor = FP32_SUMS * truth.abs().max()
    assert (error <= 2 * eager_error.max() + rounding + floor).all(), (
        name,
        error.max().item(),
        eager_error.max().item(),
    )
    assert error.mean() <= 2 * eager_error.mean() + rounding.mean() + floor, (name, error.mean().item())
