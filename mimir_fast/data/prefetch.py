"""Batches on the device ahead of time."""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor


def prefetch(batches: Iterable[tuple[Tensor, Tensor]], device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    """Images uint8 [B,3,H,W] and labels int64 [B] of every batch on the device.

    On CUDA the next batch is copied on a stream of its own while the current one is worked on (pinned memory makes the copy
    asynchronous); elsewhere batches pass one by one.
    """
    if device.type != "cuda":
        for images, labels in batches:
            yield images.to(device), labels.to(device)
        return
    stream = torch.cuda.Stream(device)
    upcoming = None
    for batch in batches:
        with torch.cuda.stream(stream):
            copied = tuple(part.to(device, non_blocking=True) for part in batch), stream.record_event()
        if upcoming is not None:
            yield _arrived(*upcoming)
        upcoming = copied
    if upcoming is not None:
        yield _arrived(*upcoming)


def _arrived(batch: tuple[Tensor, Tensor], copied: torch.cuda.Event) -> tuple[Tensor, Tensor]:
    """What is enqueued from now on waits for the copy, and the memory stays until that is done."""
    current = torch.cuda.current_stream()
    current.wait_event(copied)
    for part in batch:
        part.record_stream(current)
    return batch
