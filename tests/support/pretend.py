"""A pretend device: made-up times of candidates, some of which are wrong, raise, or run out of memory."""

from collections.abc import Callable

import torch

from mimir_fast.tuning.records import Candidate, Problem

ATTENTION = Problem("attention", (50, 12, 64), "bf16", 512)
MLP = Problem("mlp", (768, 3072), "bf16", 25600)


def candidates(*names: str) -> list[Candidate]:
    return [Candidate(*name.split("/")) for name in names]


class Pretend:
    """A Bench: seconds of each candidate by name, a list of them in turns, or what is wrong with it: a text or an exception."""

    def __init__(self, table: dict):
        self.table, self.order = table, []

    def wrong(self, candidate: Candidate) -> str:
        found = self.table[str(candidate)]
        if isinstance(found, Exception):
            raise found
        return found if isinstance(found, str) else ""

    def timed(self, candidate: Candidate) -> Callable[[], float]:
        found = self.table[str(candidate)]
        turns = iter(found if isinstance(found, list) else [found] * 1000)

        def once() -> float:
            self.order.append(str(candidate))
            return next(turns)

        return once


OUT_OF_MEMORY = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB")
