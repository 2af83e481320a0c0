"""Rows of metrics on their way from the device: none is read before the step that writes it is done."""

import torch

from mimir_fast.training.metrics_table import Reading


class Copying:
    """The event of a copy that ends when somebody waits for it."""

    def __init__(self, rows: torch.Tensor):
        self.rows, self.done = rows, False

    def query(self) -> bool:
        return self.done

    def synchronize(self) -> None:
        self.done = True
        self.rows.copy_(torch.tensor([[0.5, 2.0], [0.25, 1.0]]))


def test_rows_are_read_when_their_copy_is_done():
    rows = torch.full((2, 2), torch.nan)
    reading = Reading(["loss", "grad_norm"], rows, Copying(rows))
    assert not reading.is_there()
    assert reading.lines() == [{"loss": 0.5, "grad_norm": 2.0}, {"loss": 0.25, "grad_norm": 1.0}]
    assert reading.is_there()
