"""Encoding: processes that decode images and write them into shards, in their order whatever the number of processes."""

import multiprocessing
import os
import queue
import signal
import threading
import zlib
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple

import numpy as np

from mimir_fast.data.cache.format import Options, shard_name
from mimir_fast.data.cache.originals import Originals
from mimir_fast.data.cache.pixels import reduced, to_pixels
from mimir_fast.data.eval_stream import resized
from mimir_fast.data.folders import BadImageError

# Images that a process takes at a time.
CHUNK = 32
# Bytes that it collects before it writes; up to three times as many wait to be written.
PIECE = 32 * 2**20
# Ending of a shard that is being written.
PARTIAL = ".partial"
# Forked processes share the list of files, or the images of an npz; spawned ones would be sent a copy each.
FORK = multiprocessing.get_context("fork")


class Chunk(NamedTuple):
    """Images first to last - 1 of a shard."""

    shard: int
    first: int
    last: int


class Encoded(NamedTuple):
    """An image that was written, or left out for a reason: its sizes (height, width) and checksum are 0 then."""

    stored: tuple[int, int]
    original: tuple[int, int]
    crc: int
    reason: str = ""


class Piece(NamedTuple):
    """Bytes of consecutive images of a chunk, and whether they are its last ones."""

    number: int
    data: list[np.ndarray]
    images: list[Encoded]
    last: bool


def encode(originals: Originals, index: int, options: Options) -> tuple[np.ndarray, Encoded]:
    """An image's bytes, uint8 [...], and what is to be recorded of it."""
    try:
        # Where luma and chroma are stored, they are taken as they are in the file.
        image = originals.read(index, ycc=options.pixels == "yuv420")
    except BadImageError as error:
        return np.empty(0, np.uint8), Encoded((0, 0), (0, 0), 0, str(error))
    original = image.height, image.width
    image = resized(image, options.input_size) if options.input_size else reduced(image, options.size)
    data = np.ascontiguousarray(to_pixels(image, options.pixels))
    return data, Encoded((image.height, image.width), original, zlib.crc32(data.data))


class Turns:
    """Hands out chunks to processes, and places in the shards in the order of the chunks."""

    def __init__(self) -> None:
        # Without locks of their own: `changed` guards all three.
        self.taken, self.turn, self.end = (FORK.Value("q", 0, lock=False) for _ in range(3))
        self.changed = FORK.Condition()

    def take(self) -> int:
        """The number of the next chunk to encode."""
        with self.changed:
            self.taken.value += 1
            return self.taken.value - 1

    def reserve(self, number: int, begins_shard: bool, count: int, last: bool) -> int:
        """The offset in the shard for `count` bytes of a chunk, once it is its turn; last: the next chunk's turn is next."""
        with self.changed:
            self.changed.wait_for(lambda: self.turn.value == number)
            # Places alone are given out in turn: processes then write at the same time.
            offset = 0 if begins_shard else self.end.value
            self.end.value = offset + count
            if last:
                self.turn.value += 1
                self.changed.notify_all()
            return offset


class Encoder:
    """One process's work: encodes chunks, and writes what it has encoded in a thread of its own meanwhile."""

    def __init__(self, originals: Originals, options: Options, folder: Path, chunks: list[Chunk], turns: Turns):
        self.originals, self.options, self.folder = originals, options, folder
        self.chunks, self.turns = chunks, turns
        self.pieces: queue.Queue[Piece | None] = queue.Queue(maxsize=1)

    def run(self, results: Connection, alive: tuple[int, int]) -> None:
        """The process: sends (chunk number, images, bytes), or the text of an error.  Ends when its parent does."""
        # A terminal or a scheduler signals all processes of a job; the parent alone decides what becomes of the build.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        # The parent alone holds the other end: reading returns when it is gone, however it ended.
        os.close(alive[1])
        threading.Thread(target=lambda: (os.read(alive[0], 1), os._exit(1)), daemon=True).start()
        writer = threading.Thread(target=self._write, args=(results,))
        writer.start()
        try:
            while (number := self.turns.take()) < len(self.chunks):
                self._encode(number)
        finally:
            self.pieces.put(None)
            writer.join()

    def _encode(self, number: int) -> None:
        chunk, data, images = self.chunks[number], [], []
        for index in range(chunk.first, chunk.last):
            pixels, image = encode(self.originals, index, self.options)
            data.append(pixels)
            images.append(image)
            if sum(part.nbytes for part in data) >= PIECE and index + 1 < chunk.last:
                self.pieces.put(Piece(number, data, images, last=False))
                data, images = [], []
        self.pieces.put(Piece(number, data, images, last=True))

    def _write(self, results: Connection) -> None:
        written: list[Encoded] = []
        begun = False
        while (piece := self.pieces.get()) is not None:
            chunk, count = self.chunks[piece.number], sum(part.nbytes for part in piece.data)
            begins = not begun and chunk.first % self.options.shard_images == 0
            offset = self.turns.reserve(piece.number, begins, count, piece.last)
            try:
                write_at(self.folder / (shard_name(chunk.shard) + PARTIAL), offset, piece.data)
            except OSError as error:
                results.send(f"could not write {self.folder / shard_name(chunk.shard)}: {error.strerror}")
                # Not an exception: the other thread may wait for room in the queue.
                os._exit(1)
            written, begun = written + piece.images, not piece.last
            if piece.last:
                results.send((piece.number, written))
                written = []


def write_at(path: Path, offset: int, parts: list[np.ndarray]) -> None:
    """Write arrays one after the other into a file, from an offset on; the file is made.  Raises OSError."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT, 0o644)
    try:
        for part in parts:
            left = part.data.cast("B") if part.nbytes else memoryview(b"")
            while left:
                # With the place in the call: the file has several writers.  A nearly full disk takes a part.
                done = os.pwrite(descriptor, left, offset)
                left, offset = left[done:], offset + done
    finally:
        os.close(descriptor)
