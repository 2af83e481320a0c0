"""Prefetch: copies the next batch to the GPU while the current one is in use."""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from mimir_fast.data.cache.packed import PackedBatch, PackedEpoch


def prefetch(batches: Iterable[tuple[Tensor, Tensor]], device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    """Images uint8 [B,3,H,W] and labels int64 [B] of every batch, on the device.

    On CUDA the next batch is copied on a side stream while the current one is in use (asynchronously if it is in pinned
    memory), and crops of a cache are made there; elsewhere each batch is copied when it is asked for.
    """
    if device.type != "cuda":
        for images, labels in batches:
            yield images.to(device), labels.to(device)
        return
    stream = torch.cuda.Stream(device)
    upcoming: tuple[tuple[Tensor, Tensor], torch.cuda.Event] | None = None
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
        upcoming = copies, copied
    if upcoming is not None:
        yield _arrived(*upcoming)


def _arrived(batch: tuple[Tensor, Tensor], copied: torch.cuda.Event) -> tuple[Tensor, Tensor]:
    """The batch, on which the current stream may compute: it waits for the copy, the host does not."""
    current = torch.cuda.current_stream()
    current.wait_event(copied)
    # The memory was allocated on the side stream: without this the allocator would hand it out again while it is in use here.
    for part in batch:
        part.record_stream(current)
    return batch
