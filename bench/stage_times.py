"""How long the stages of every update take: CUDA events where the step runs on a GPU, the host's clock elsewhere.

Events are recorded on the stream that the stage works on and read after the last update, so the step never waits.
"""

import statistics
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import NamedTuple

import torch

BESIDE = "penalty"  # on CUDA it runs beside the decoder, on a stream of its own
WHOLE = "attack"  # its own stages belong to it


class Range(NamedTuple):
    """One stage: its name, the stage around it, when it began and ended."""

    name: str
    outer: str | None
    start: float | torch.cuda.Event
    end: float | torch.cuda.Event


class StageTimes:
    """Collects ranges and updates; `open` goes to mimir_fast's `listening`, `updated` is called after every update.

    Everything up to the update number `warmup` (1 or more) is left out.
    """

    def __init__(self, device: torch.device, warmup: int):
        self.device, self.warmup = device, warmup
        self.around: list[str] = []
        self.ranges: list[Range] = []
        self.ends: list[float | torch.cuda.Event] = []  # of the updates from `warmup` on
        self.waited = self.began = self.ended = 0.0  # host seconds: in `data`; at both ends of the observed updates

    @contextmanager
    def open(self, name: str) -> Iterator[None]:
        if WHOLE in self.around:
            yield
            return
        outer = self.around[-1] if self.around else None
        self.around.append(name)
        asked, start = time.perf_counter(), self._now()
        try:
            yield
        finally:
            self.around.pop()
        if self.ends:
            self.ranges.append(Range(name, outer, start, self._now()))
            self.waited += (time.perf_counter() - asked) * (name == "data")

    def updated(self, count: int) -> None:
        if count < self.warmup:
            return
        if count == self.warmup:
            self.began = time.perf_counter()
            if self.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(self.device)
        self.ends.append(self._now())
        self.ended = time.perf_counter()

    def _now(self) -> float | torch.cuda.Event:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    # ---- after the run

    def updates(self) -> list[float]:
        """Seconds of every observed update; waits for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return [_seconds(start, end) for start, end in pairwise(self.ends)]

    def shares(self) -> dict[str, float]:
        """Each stage's share of the observed time, stages inside of it left out, and `rest`: they add up to 1.

        On CUDA the penalty overlaps the decoder: its share is its own stream's, and is in nothing else.
        """
        own: dict[str, float] = defaultdict(float)
        for r in self.ranges:
            took = _seconds(r.start, r.end)
            own[r.name] += took
            if r.outer:
                own[r.outer] -= took
        whole = sum(self.updates())
        overlaps = self.device.type == "cuda"
        own["rest"] = whole - sum(took for name, took in own.items() if not (overlaps and name == BESIDE))
        return {name: took / whole for name, took in own.items()}

    def data_wait(self) -> float:
        """Share of the host's time that it waited for images; the device may have had work meanwhile."""
        return self.waited / (self.ended - self.began)


def percentiles(values: list[float]) -> dict[str, float]:
    """The 20th and the 80th; of one value, that value."""
    cuts = statistics.quantiles(values, n=5, method="inclusive") if len(values) > 1 else values
    return {"20": cuts[0], "80": cuts[-1]}


def _seconds(start, end) -> float:
    return end - start if isinstance(start, float) else start.elapsed_time(end) / 1e3
