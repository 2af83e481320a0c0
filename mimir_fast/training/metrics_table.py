"""Table of metrics: one row per update, written on the device by the step itself and read back without stopping it."""

from collections import Counter
from typing import NamedTuple

import torch
from torch import Tensor

from mimir_fast.training.distributed import World

# Rows are read when so many are there, whatever the interval of the logs.
MOST_ROWS = 1024


class Reading(NamedTuple):
    """Rows on their way to the host: names of their columns, float32 [rows, columns], and the event of a copy from CUDA."""

    names: list[str]
    rows: Tensor
    copied: torch.cuda.Event | None

    def is_there(self) -> bool:
        """Whether `lines` would not wait."""
        return self.copied is None or self.copied.query()

    def lines(self) -> list[dict[str, float]]:
        """The rows by name; the host waits until they are there."""
        if self.copied is not None and not self.copied.query():
            self.copied.synchronize()
        return [dict(zip(self.names, row)) for row in self.rows.tolist()]


class MetricsTable:
    """Rows of device scalars, float32 [capacity, columns] on the device; the number of the next row is there as well.

    Writing is work on the device at fixed addresses, which a CUDA graph can hold; the caller counts the rows.
    """

    def __init__(self, device: torch.device, capacity: int):
        self.capacity = min(capacity, MOST_ROWS)
        self.names: list[str] = []
        self.rows = torch.empty(0, 0, device=device)
        self.next = torch.zeros(1, dtype=torch.int64, device=device)

    def write(self, scalars: dict[str, Tensor]) -> None:
        """Write the next row: device scalars, under the same names every time."""
        if not self.names:
            self.names, self.rows = (
                list(scalars),
                self.next.new_zeros((self.capacity, len(scalars)), dtype=torch.float32),
            )
        row = torch.stack([scalars[name].detach().float() for name in self.names])
        # The row's number is a tensor: a plain number would be frozen into a captured graph.
        self.rows.index_copy_(0, self.next, row[None])
        self.next += 1

    def read(self, count: int, world: World) -> Reading:
        """The `count` rows since the last reading, averaged over all processes, which all call; writing starts over."""
        rows = world.mean(self.rows[:count])
        self.next.zero_()
        if rows.device.type != "cuda":
            return Reading(self.names, rows.clone(), None)
        host = torch.empty(rows.shape, pin_memory=True)
        host.copy_(rows, non_blocking=True)
        copied = torch.cuda.Event()
        copied.record()
        return Reading(self.names, host, copied)


class RowQueue:
    """Rows of a table with the host's share of each, on their way: counted, asked for, taken."""

    def __init__(self, table: MetricsTable, world: World):
        self.table, self.world = table, world
        self._hosts: list[dict] = []
        self._totals: Counter[str] = Counter()
        self._asked: list[tuple[list[dict], Counter[str], Reading]] = []

    def add(self, host: dict, amounts: dict[str, float]) -> None:
        """Count a row that the device writes; amounts: are added up over the rows that are taken together."""
        self._hosts.append(host)
        self._totals.update(amounts)
        if len(self._hosts) == self.table.capacity:
            self.ask()

    def ask(self) -> bool:
        """Ask for the rows since the last time, averaged over all processes, which all call; returns whether there is nothing
        to wait for: not whether the rows are there by now, since every process must act alike."""
        if self._hosts:
            self._asked.append((self._hosts, self._totals, self.table.read(len(self._hosts), self.world)))
            self._hosts, self._totals = [], Counter()
        return all(reading.copied is None for _, _, reading in self._asked)

    def arrived(self) -> bool:
        """Whether there are rows to take, and `take` would not wait."""
        return bool(self._asked) and self._asked[-1][2].is_there()

    def take(self) -> tuple[list[dict], Counter[str]]:
        """The rows asked for, and their amounts; the host waits for them."""
        asked, self._asked = self._asked, []
        rows = [host | line for hosts, _, reading in asked for host, line in zip(hosts, reading.lines())]
        return rows, sum((totals for _, totals, _ in asked), Counter())
