"""Stopwatches: how long work takes on a device."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

import torch

from mimir_fast.training.step_graph import CudaRecorder

# Calls before the first that is timed: they compile, load kernels and choose algorithms of cuBLAS.
WARM_UP = 3
# Bytes written before each time, at least: on top of what the L2 cache holds.
FLUSH = 64 * 2**20


class Stopwatch(Protocol):
    """Times work on one device."""

    def context(self):
        """Context in which all work must be done that is timed."""
        ...

    def ready(self, work: Callable[[], object]) -> Callable[[], float]:
        """Warm up; the function returned does the work once and returns its seconds."""
        ...

    def release(self) -> None:
        """Let go of what `ready` made."""
        ...


class CudaStopwatch:
    """Device time between two events around a CUDA graph, so that the host's time does not count, with a cold L2 cache.

    In a step other tensors pass through the cache between two calls of the same operation.
    """

    def __init__(self, device: torch.device):
        self.recorder = CudaRecorder(device)
        size = max(FLUSH, 2 * torch.cuda.get_device_properties(device).L2_cache_size)
        self.flush = torch.empty(size, dtype=torch.int8, device=device)

    def context(self):
        return self.recorder.context()

    def ready(self, work: Callable[[], object]) -> Callable[[], float]:
        for _ in range(WARM_UP):
            work()
        self.recorder.begin()
        try:
            work()
        except BaseException:
            self.recorder.abandon()
            raise
        launch = self.recorder.end()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

        def once() -> float:
            # The device is busy with this until the graph has been launched: no gap between event and graph.
            self.flush.zero_()
            begin.record()
            launch()
            end.record()
            end.synchronize()
            return begin.elapsed_time(end) / 1e3

        return once

    def release(self) -> None:
        torch.cuda.synchronize(self.recorder.stream.device)
        self.recorder.release()
        # cuBLAS keeps 32 MiB for every stream that it was ever called on, and the run has streams of its own.
        torch._C._cuda_clearCublasWorkspaces()
        torch.cuda.empty_cache()


class CpuStopwatch:
    """Processor time of all threads of this process, which other programs on the machine lengthen little."""

    @contextmanager
    def context(self) -> Iterator[None]:
        yield

    def ready(self, work: Callable[[], object]) -> Callable[[], float]:
        for _ in range(WARM_UP):
            work()

        def once() -> float:
            started = time.process_time()
            work()
            return time.process_time() - started

        return once

    def release(self) -> None:
        """There is nothing to let go of."""


def stopwatch_for(device: torch.device) -> Stopwatch:
    """The one for a device."""
    return CudaStopwatch(device) if device.type == "cuda" else CpuStopwatch()
