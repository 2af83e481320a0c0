"""Sums over the micro-steps of an epoch, kept on the device."""

import torch
from torch import Tensor

from mimir_fast.training.distributed import World


class EpochSums:
    """Sums by name, float64 on the device at a fixed address; start: those of an interrupted epoch, the mean over all
    processes."""

    def __init__(self, start: dict[str, float], device: torch.device):
        self.names: list[str] = []
        self.values = torch.empty(0, dtype=torch.float64, device=device)
        self.restart(start)

    def restart(self, start: dict[str, float]) -> None:
        """Begin an epoch; start: as above, {} for all zero."""
        if start and set(start) != set(self.names):
            self.names, self.values = list(start), self.values.new_zeros(len(start))
        # In place: a captured step goes on adding where it did.
        self.values.copy_(torch.tensor([start.get(name, 0.0) for name in self.names], dtype=torch.float64))

    def add(self, terms: dict[str, Tensor]) -> None:
        """Add device scalars, under the same names every time."""
        if not self.names:
            self.names, self.values = list(terms), self.values.new_zeros(len(terms))
        self.values += torch.stack([terms[name].double() for name in self.names])

    def means(self, world: World) -> dict[str, float]:
        """Averages of the sums over all processes; every process calls it, and the host waits for the device."""
        if not self.names:
            return {}
        return dict(zip(self.names, world.mean(self.values).tolist()))
