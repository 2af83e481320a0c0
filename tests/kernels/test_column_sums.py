"""The second stage of sums over rows, in the interpreter."""

import pytest
import torch

from mimir_fast.kernels._shared.column_sums import add_partials
from tests.support.interpreter import Sanitizer, interpret


@pytest.mark.parametrize("count", [3, 2, 1])
def test_partial_sums_of_more_groups_than_a_tile_has(count):
    partials, sums = torch.randn(count, 300, 40), [torch.full((40,), torch.nan) for _ in range(3)]
    with interpret(Sanitizer()) as s:
        add_partials(partials, sums[:count])
    assert not s.errors
    torch.testing.assert_close(torch.stack(sums[:count]), partials.sum(1), atol=1e-4, rtol=1e-5)
    assert sum(t.isnan().all() for t in sums) == 3 - count
