"""The second stage of sums over rows, in the interpreter."""

import pytest
import torch

from mimir_fast.kernels._shared.column_sums import add_partials
from tests.support.interpreter import Sanitizer, interpret


@pytest.mark.parametrize("count", [3, 2, 1])
def test_partial_sums_of_more_groups_than_a_tile_has(count):
    partials = torch.randn(count, 300, 40)
    with interpret(Sanitizer()) as s:
        sums = add_partials(partials, (torch.float32,) * count)
    assert not s.errors
    assert s.st["store_bytes"] == count * 40 * 4
    torch.testing.assert_close(torch.stack(sums), partials.sum(1), atol=1e-4, rtol=1e-5)
