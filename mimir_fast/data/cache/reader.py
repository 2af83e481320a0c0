"""Reader: threads that copy the rows of batches of crops from a cache into page-locked buffers.

Shapes: B images.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import NamedTuple

import numpy as np
import torch

from mimir_fast.data.batch_order import BatchKey
from mimir_fast.data.cache.images import CachedImages
from mimir_fast.data.cache.index import check_image
from mimir_fast.data.cache.windows import Windows, table_bytes, table_slices, windows
from mimir_fast.data.errors import NoBatchError

# Buffers: one whose batch is in use or on its way to the GPU, others that are being filled.
BUFFERS = 4
# Seconds without an image after which the threads count as stuck.
STUCK_AFTER = 300.0
# Seconds that they have to end.
PATIENCE = 2.0


class Buffer:
    """Memory for a batch: its table and its rows (see windows.py)."""

    def __init__(self, batch_size: int, rows_bytes: int, pin_memory: bool):
        self.batch_size, self.pin_memory = batch_size, pin_memory
        self.copied: torch.cuda.Event | None = None
        self._allocate(table_bytes(batch_size) + rows_bytes)

    def _allocate(self, count: int) -> None:
        self.memory = torch.empty(count, dtype=torch.uint8, pin_memory=self.pin_memory)
        self.bytes = self.memory.numpy()
        self.view = self.bytes.data

    def begin(self, batch: Windows) -> None:
        """Write the table, once the batch before has left; the buffer grows if the rows have no room."""
        if self.copied is not None:
            # The GPU may still be reading the rows of the batch before: a copy from page-locked memory runs on its own.
            self.copied.synchronize()
            self.copied = None
        first = table_bytes(self.batch_size)
        if first + batch.bytes > len(self.memory):
            self._allocate(first + batch.bytes)
        self.used = first + batch.bytes
        for part, column in zip(table_slices(self.batch_size), batch.table):
            self.bytes[part] = np.ascontiguousarray(column).view(np.uint8).reshape(-1)


class Part(NamedTuple):
    """Images first to last - 1 of a batch that is being read."""

    filling: "Filling"
    first: int
    last: int


class Filling:
    """A batch that is being read into a buffer; left: its images that are not there yet."""

    def __init__(self, buffer: Buffer, batch: Windows, key: BatchKey):
        self.buffer, self.key, self.left = buffer, key, len(batch.rows)
        # Lists: a number of an array costs more to read than a byte to copy.
        self.rows, self.shards = batch.rows.tolist(), batch.shards.tolist()
        self.starts, self.counts = batch.starts.tolist(), batch.counts.tolist()
        self.image_starts, self.image_counts = batch.image_starts.tolist(), batch.image_counts.tolist()
        first = table_bytes(buffer.batch_size)
        self.places = (batch.table.offsets + first).tolist()


class Reader:
    """Reads batches of crops; one epoch at a time.

    images       of the cache
    batch_size   B; seed of the crops
    threads      that read
    pin_memory   page-locked buffers, for copies to a GPU that nobody waits for
    """

    def __init__(self, images: CachedImages, batch_size: int, seed: int, threads: int, pin_memory: bool):
        self.images, self.seed, self.threads = images, seed, threads
        cache = images.cache
        self.pixels = cache.manifest.options.pixels
        sizes = cache.index.bytes(self.pixels).astype(np.float64)
        # Whole images of a batch of this size, six deviations above the mean.
        room = int(batch_size * sizes.mean() + 6 * batch_size**0.5 * sizes.std())
        self.new_buffer = partial(Buffer, batch_size, room, pin_memory)
        self.renew()
        # Images that were read whole and compared with their checksums in this run.
        # A byte each and no lock: two threads that check one image at once write the same value.
        self.checked = bytearray(len(cache.index))

    def renew(self) -> None:
        """Take new buffers."""
        self.buffers = [self.new_buffer() for _ in range(BUFFERS)]

    def windows(self, key: BatchKey) -> Windows:
        """What is to be read for a batch."""
        images, indices = self.images, key.indices
        where = (images.cache.index, self.pixels, images.shown[indices], images.labels[indices])
        return windows(*where, indices, self.seed, key.epoch)

    def read(self, part: Part, scratch: list[np.ndarray]) -> None:
        """Copy the rows of some images into their buffer; scratch: one array, which grows."""
        f, shards, index = part.filling, self.images.cache.shards, self.images.cache.index
        view = f.buffer.view
        for n in range(part.first, part.last):
            place, count = f.places[n], f.counts[n]
            # A checksum is of the whole image: it is read whole the first time, and afterwards the crop's rows alone.
            if self.checked[f.rows[n]]:
                shards.read(f.shards[n], f.starts[n], view[place : place + count])
                continue
            whole = f.image_counts[n]
            if len(scratch[0]) < whole:
                scratch[0] = np.empty(whole, np.uint8)
            data = scratch[0][:whole]
            shards.read(f.shards[n], f.image_starts[n], data.data)
            check_image(shards.path(f.shards[n]), f.rows[n], index, data)
            skipped = f.starts[n] - f.image_starts[n]
            f.buffer.bytes[place : place + count] = data[skipped : skipped + count]
            self.checked[f.rows[n]] = 1


class Epoch:
    """The batches of one epoch, read ahead by threads of its own; iterate it once, then `close` it."""

    def __init__(self, reader: Reader, keys: Iterable[BatchKey], interrupted: Callable[[], bool] = lambda: False):
        self.reader, self.keys, self.interrupted = reader, iter(keys), interrupted
        self.changed = threading.Condition()
        self.free = deque(reader.buffers)
        self.order: deque[Filling] = deque()
        self.parts: deque[Part] = deque()
        self.error: BaseException | None = None
        self.ended = False
        self.progress = time.monotonic()
        self.threads = [threading.Thread(target=self._work, daemon=True) for _ in range(reader.threads)]
        for thread in self.threads:
            thread.start()

    def __iter__(self) -> Iterator[Filling]:
        """Batches in order; a buffer is filled again when the next batch is asked for.  Raises what a thread met."""
        while (filling := self._next()) is not None:
            yield filling
            with self.changed:
                self.free.append(filling.buffer)
                self.changed.notify_all()

    def _next(self) -> Filling | None:
        with self.changed:
            while not (self.order and self.order[0].left == 0):
                if self.error is not None:
                    raise self.error
                if self.ended and not self.order:
                    return None
                if not any(thread.is_alive() for thread in self.threads):
                    raise NoBatchError("data_threads: all threads that read have ended")
                # Every second, since a signal's handler sets a flag and wakes no thread that waits for a condition.
                if not self.changed.wait(timeout=1):
                    self._check_silence()
            return self.order.popleft()

    def _check_silence(self) -> None:
        """Raise NoBatchError if the run was told to end, or nothing was read for long."""
        if self.interrupted():
            raise NoBatchError("stopped while no image could be read")
        if time.monotonic() - self.progress > STUCK_AFTER:
            raise NoBatchError(
                f"data_root: no image of {self.reader.images.cache.folder} could be read for {STUCK_AFTER:.0f} s: "
                "the disk or the network does not answer"
            )

    def _work(self) -> None:
        scratch = [np.empty(0, np.uint8)]
        try:
            while (part := self._take()) is not None:
                self.reader.read(part, scratch)
                with self.changed:
                    self.progress = time.monotonic()
                    part.filling.left -= part.last - part.first
                    if part.filling.left == 0:
                        self.changed.notify_all()
        # Whatever it is: the loop raises it.
        except BaseException as error:
            with self.changed:
                self.error = self.error or error
                self.changed.notify_all()

    def _take(self) -> Part | None:
        """The next images to read; None at the end."""
        with self.changed:
            while not self.parts:
                if self.ended or self.error is not None:
                    return None
                if not self.free:
                    self.changed.wait()
                # Still under the lock, so that batches begin in the order of their keys.
                elif (key := next(self.keys, None)) is None:
                    self.ended = True
                    self.changed.notify_all()
                else:
                    self._begin(key)
            return self.parts.popleft()

    def _begin(self, key: BatchKey) -> None:
        """Begin a batch in a free buffer."""
        batch, buffer = self.reader.windows(key), self.free.popleft()
        buffer.begin(batch)
        filling = Filling(buffer, batch, key)
        self.order.append(filling)
        # Two parts for each thread: those that are done early help the others.
        size = -(-len(batch.rows) // (2 * self.reader.threads))
        firsts = range(0, len(batch.rows), size)
        self.parts += [Part(filling, first, min(first + size, len(batch.rows))) for first in firsts]
        self.progress = time.monotonic()
        self.changed.notify_all()

    def close(self) -> None:
        """End the threads."""
        with self.changed:
            self.ended = True
            self.parts.clear()
            self.changed.notify_all()
        deadline = time.monotonic() + PATIENCE
        for thread in self.threads:
            thread.join(timeout=max(deadline - time.monotonic(), 0))
        if any(thread.is_alive() for thread in self.threads):
            # They may still write into their buffers, when the disk answers; they end then, or with the process.
            self.reader.renew()
