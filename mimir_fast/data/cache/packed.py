"""Packed batches: rows of a cache, of which a device makes crops.  Shapes: B batch, S side of the crops."""

from collections.abc import Callable, Generator, Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from mimir_fast.data.batch_order import BatchKey
from mimir_fast.data.cache.images import CachedImages
from mimir_fast.data.cache.reader import Buffer, Epoch, Reader
from mimir_fast.data.cache.windows import COLUMNS, table_bytes, table_slices
from mimir_fast.kernels import crop_resize, crop_resize_yuv420


class PackedBatch(NamedTuple):
    """A batch in a buffer on the host, or its copy on a device.

    memory       of the buffer, from its beginning as far as the batch reaches
    pixels       of the cache; input_size: S; kernels: implementation of the crops
    """

    buffer: Buffer
    memory: Tensor
    pixels: str
    input_size: int
    kernels: str

    def on(self, device: torch.device) -> "PackedBatch":
        """The batch on a device; on CUDA nobody waits, and the current stream copies."""
        buffer = self.buffer
        if device.type != "cuda":
            return self
        # As large for every batch: the allocator then has one block to give again.
        there = torch.empty(len(buffer.memory), dtype=torch.uint8, device=device)[: len(self.memory)]
        there.copy_(self.memory, non_blocking=True)
        # Whoever fills the buffer next waits for this event, and not the step.
        buffer.copied = torch.cuda.current_stream(device).record_event()
        return self._replace(memory=there)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Of the crops."""
        return self.buffer.batch_size, 3, self.input_size, self.input_size

    def crops(self, dtype: torch.dtype, out: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Crops [B,3,S,S], fp32 in [0,1] or uint8, in `out` if that is given, and labels int64 [B]."""
        count = self.buffer.batch_size
        parts = zip(table_slices(count), COLUMNS)
        offsets, labels, sizes, boxes, flips = (self.memory[part].view(dtype) for part, (_, dtype, _) in parts)
        rows = self.memory[table_bytes(count) :]
        crop = crop_resize_yuv420 if self.pixels == "yuv420" else crop_resize
        where = (offsets, sizes.view(count, 2), boxes.view(count, 4), flips)
        images = crop(rows, *where, self.input_size, dtype, self.kernels, out)
        # The buffer is filled again while these labels are in use.
        return images, labels.clone()


class PackedEpoch:
    """The batches of an epoch: images uint8 [B,3,S,S] and labels int64 [B] made on the CPU, or by `packed` as they are read."""

    def __init__(self, batches: Generator[PackedBatch, None, None]):
        self.batches = batches

    def packed(self) -> Iterator[PackedBatch]:
        """The batches, each to be used before the next is asked for."""
        return self.batches

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return self

    def __next__(self) -> tuple[Tensor, Tensor]:
        return next(self.batches).crops(torch.uint8)

    def close(self) -> None:
        """End the threads that read."""
        self.batches.close()


class CachedCrops:
    """Random crops of the images of a cache, the boxes those of image files: a function of (seed, epoch, index).

    source       the images
    batch_size   B; input_size: S, pixels
    threads      that read
    pin_memory   page-locked buffers
    kernels      implementation of the crops: auto, triton or reference
    """

    def __init__(
        self,
        source: CachedImages,
        batch_size: int,
        input_size: int,
        seed: int,
        threads: int,
        pin_memory: bool,
        kernels: str = "auto",
    ):
        self.source, self.input_size, self.kernels = source, input_size, kernels
        self.pixels = source.cache.manifest.options.pixels
        self.reader = Reader(source, batch_size, seed, threads, pin_memory and torch.cuda.is_available())

    def epoch(self, keys: Iterable[BatchKey], interrupted: Callable[[], bool]) -> PackedEpoch:
        """The batches of an epoch; the one before must be closed.

        interrupted   asked while no batch comes: whether the run was told to end
        Iterating raises DataError for what cannot be read, NoBatchError where nothing comes.
        """
        return PackedEpoch(self._batches(keys, interrupted))

    def _batches(self, keys: Iterable[BatchKey], interrupted: Callable[[], bool]) -> Generator[PackedBatch, None, None]:
        epoch = Epoch(self.reader, keys, interrupted)
        try:
            for filling in epoch:
                self.source.bad.record(self.source.unreadable(filling.key.indices))
                memory = filling.buffer.memory[: filling.buffer.used]
                yield PackedBatch(filling.buffer, memory, self.pixels, self.input_size, self.kernels)
        finally:
            epoch.close()
