"""Prefetch: copies the next batch to the GPU while the current one is in use."""

from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache

import torch
from torch import Tensor

from mimir_fast.data.cache.packed import PackedBatch, PackedEpoch

Batch = tuple[Tensor, Tensor] | PackedBatch
# Of a shape: the tensor that crops of it are to be written to, None for a new one.
Place = Callable[[tuple[int, ...]], Tensor | None]


def prefetch(
    batches: Iterable[tuple[Tensor, Tensor]], device: torch.device, place: Place = lambda shape: None
) -> Iterator[tuple[Tensor, Tensor]]:
    """Images [B,3,H,W] and labels int64 [B] of every batch, on the device: uint8, from a cache in the dtype of `place`.

    place   where crops of a cache are written, uint8 or fp32 in [0,1], or None: to new fp32 tensors; the batch before may be
            overwritten when the next is asked for

    On CUDA the next batch is copied on a side stream while the current one is in use (asynchronously if it is in pinned
    memory), and the host gets at most two batches ahead of the device; elsewhere each batch is copied when it is asked for.
    """
    each: Iterable[Batch] = batches.packed() if isinstance(batches, PackedEpoch) else batches
    if device.type != "cuda":
        for batch in each:
            yield _cropped(_copied(batch, device), place)
        return
    stream = _side_stream(device)
    upcoming: tuple[Batch, torch.cuda.Event] | None = None
    used: torch.cuda.Event | None = None
    for batch in each:
        with torch.cuda.stream(stream):
            copy = _copied(batch, device)
            # Queued before the batch in hand is given out, so that the copy runs while that one is in use.
            copied = stream.record_event()
        if upcoming is not None:
            yield _cropped(_arrived(*upcoming), place)
            used = _not_far_ahead(used)
        upcoming = copy, copied
    if upcoming is not None:
        yield _cropped(_arrived(*upcoming), place)


def _copied(batch: Batch, device: torch.device) -> Batch:
    """A batch on the device."""
    if isinstance(batch, PackedBatch):
        return batch.on(device)
    return batch[0].to(device, non_blocking=True), batch[1].to(device, non_blocking=True)


def _cropped(batch: Batch, place: Place) -> tuple[Tensor, Tensor]:
    """Images and labels of a batch on the device; the current stream crops."""
    if not isinstance(batch, PackedBatch):
        return batch
    there = place(batch.shape)
    return batch.crops(torch.float32 if there is None else there.dtype, there)


# One for all epochs: the allocator keeps the memory of a stream for that stream.
@lru_cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def _arrived(batch: Batch, copied: torch.cuda.Event) -> Batch:
    """The batch, on which the current stream may compute: it waits for the copy, the host does not."""
    current = torch.cuda.current_stream()
    current.wait_event(copied)
    # The memory was allocated on the side stream: without this the allocator would hand it out again while it is in use here.
    for part in [batch.memory] if isinstance(batch, PackedBatch) else batch:
        part.record_stream(current)
    return batch


def _not_far_ahead(used: torch.cuda.Event | None) -> torch.cuda.Event:
    """The end of the work that was just enqueued, after waiting for that of the batch before (used)."""
    # A step is launched in no time: without this the host would fill the device's memory, and pinned memory, with batches.
    # The device has a whole step to do meanwhile.
    if used is not None and not used.query():
        used.synchronize()
    return torch.cuda.current_stream().record_event()
