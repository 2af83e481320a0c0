"""Prefetch: copies the next batch to the GPU while the current one is in use."""

from collections.abc import Iterable, Iterator
from functools import lru_cache

import torch
from torch import Tensor

from mimir_fast.data.cache.packed import PackedBatch, PackedEpoch


def prefetch(batches: Iterable[tuple[Tensor, Tensor]], device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    """Images uint8 [B,3,H,W] and labels int64 [B] of every batch, on the device.

    On CUDA the next batch is copied on a side stream while the current one is in use (asynchronously if it is in pinned
    memory), crops of a cache are made there, and the host gets at most two batches ahead of the device; elsewhere each batch is
    copied when it is asked for.
    """
    if device.type != "cuda":
        for images, labels in batches:
            yield images.to(device), labels.to(device)
        return
    stream = _side_stream(device)
    upcoming: tuple[tuple[Tensor, Tensor], torch.cuda.Event] | None = None
    used: torch.cuda.Event | None = None
    for batch in batches.packed() if isinstance(batches, PackedEpoch) else batches:
        with torch.cuda.stream(stream):
            if isinstance(batch, PackedBatch):
                copies = batch.on(device)
            else:
                copies = batch[0].to(device, non_blocking=True), batch[1].to(device, non_blocking=True)
            # Queued before the batch in hand is given out, so that the copy runs while that one is in use.
            copied = stream.record_event()
        if upcoming is not None:
            yield _arrived(*upcoming)
            used = _not_far_ahead(used)
        upcoming = copies, copied
    if upcoming is not None:
        yield _arrived(*upcoming)


# One for all epochs: the allocator keeps the memory of a stream for that stream.
@lru_cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def _arrived(batch: tuple[Tensor, Tensor], copied: torch.cuda.Event) -> tuple[Tensor, Tensor]:
    """The batch, on which the current stream may compute: it waits for the copy, the host does not."""
    current = torch.cuda.current_stream()
    current.wait_event(copied)
    # The memory was allocated on the side stream: without this the allocator would hand it out again while it is in use here.
    for part in batch:
        part.record_stream(current)
    return batch


def _not_far_ahead(used: torch.cuda.Event | None) -> torch.cuda.Event:
    """The end of the work that was just enqueued, after waiting for that of the batch before (used)."""
    # A step is launched in no time: without this the host would fill the device's memory, and pinned memory, with batches.
    # The device has a whole step to do meanwhile.
    if used is not None and not used.query():
        used.synchronize()
    return torch.cuda.current_stream().record_event()
