"""Building a cache: the same bytes whatever the number of processes, and however often it was stopped and started again."""

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict
from multiprocessing.connection import Connection, wait
from pathlib import Path

import numpy as np

from mimir_fast.checkpoints.atomic import move, remove_temporaries, write_text_atomically
from mimir_fast.checkpoints.lock import locked
from mimir_fast.data.cache.encoding import CHUNK, FORK, PARTIAL, Chunk, Encoded, Encoder, Turns
from mimir_fast.data.cache.format import Manifest, Options, is_cache, read_manifest, shard_name, write_manifest
from mimir_fast.data.cache.index import Index, joined, stand_ins, write_index
from mimir_fast.data.cache.originals import Originals
from mimir_fast.data.cache.pixels import stored_bytes
from mimir_fast.data.cache.plan import PLAN, begin, check_plan, check_space, make_plan
from mimir_fast.data.errors import BadFiles
from mimir_fast.data.folders import PathTable

KEPT = "whole shards are kept, and the same command goes on from there"
# Called after every chunk with the numbers of images done and of images in all.
Show = Callable[[int, int], None]


def build_cache(originals: Originals, dst: Path, options: Options, workers: int, show: Show) -> Manifest:
    """Make the cache DST/SPLIT by `workers` processes, or go on with one that was stopped; a finished one stays as it is.

    Raises DataError for another cache or build there, a changed source, too little space or too many unreadable images; OSError
    where the disk refuses.
    """
    folder = dst / options.split
    with locked(folder, "dst"):
        plan = make_plan(originals, options)
        if not is_cache(folder):
            begin(folder, plan, originals)
            check_space(folder, originals, options)
            shards = _Shards(originals, folder, options, workers, show).build()
            _finish(originals, folder, plan, shards)
        manifest = read_manifest(folder)
        # Of whatever versions, once it is complete.
        check_plan(folder, {**asdict(manifest), "versions": plan["versions"]}, plan, originals)
        _remove_records(folder)
        return manifest


class _Shards:
    """The shards of one cache."""

    def __init__(self, originals: Originals, folder: Path, options: Options, workers: int, show: Show):
        self.originals, self.folder, self.options = originals, folder, options
        self.workers, self.show = workers, show
        self.bad = BadFiles(originals.where, len(originals))
        self.done = 0

    def build(self) -> list[list[Encoded]]:
        """Make those that are missing; returns the images of each."""
        total, per = len(self.originals), self.options.shard_images
        firsts = range(0, total, per)
        shards: list[list[Encoded] | None] = [self._whole(shard) for shard in range(len(firsts))]
        for first, images in zip(firsts, shards):
            self._count(first, images or [])
        chunks = [
            Chunk(shard, start, min(start + CHUNK, first + per, total))
            for shard, first in enumerate(firsts)
            if shards[shard] is None
            for start in range(first, min(first + per, total), CHUNK)
        ]
        missing: dict[int, dict[int, list[Encoded]]] = {chunk.shard: {} for chunk in chunks}
        for number, images in self._encoded(chunks):
            chunk = chunks[number]
            self._count(chunk.first, images)
            parts = missing[chunk.shard]
            parts[chunk.first] = images
            if sum(map(len, parts.values())) == min(per, total - firsts[chunk.shard]):
                shards[chunk.shard] = whole = [image for start in sorted(parts) for image in parts[start]]
                self._complete(chunk.shard, whole)
        return [images for images in shards if images is not None]

    def _count(self, first: int, images: list[Encoded]) -> None:
        """Count images as done.  Raises DataError where too many are unreadable."""
        self.done += len(images)
        unreadable = {self.originals.name(first + n): image.reason for n, image in enumerate(images) if image.reason}
        self.bad.record(unreadable)
        self.show(self.done, len(self.originals))

    def _record(self, shard: int) -> Path:
        return self.folder / f"{shard_name(shard)}.json"

    def _whole(self, shard: int) -> list[Encoded] | None:
        """The images of a shard that was completed before, else None."""
        path, record = self.folder / shard_name(shard), self._record(shard)
        if not (path.exists() and record.exists()):
            return None
        images = [
            Encoded((stored[0], stored[1]), (original[0], original[1]), crc, reason)
            for stored, original, crc, reason in json.loads(record.read_text(encoding="utf-8"))
        ]
        # Its length stands for its contents: to read all that was written would take about as long as to write it.
        size = sum(stored_bytes(self.options.pixels, *image.stored) for image in images)
        return images if path.stat().st_size == size else None

    def _complete(self, shard: int, images: list[Encoded]) -> None:
        """Give a shard its name, once all of it is on the disk."""
        path = self.folder / shard_name(shard)
        partial = path.with_name(path.name + PARTIAL)
        # Not there if all of its images are unreadable.
        with open(partial, "ab") as file:
            # fsync is of the file and not of the writer: it covers what other processes have written into it.
            os.fsync(file.fileno())
        # The record first: a shard is given its name last, and then has all that `_whole` asks for.
        write_text_atomically(self._record(shard), json.dumps(images), "dst")
        move(partial, path)

    def _encoded(self, chunks: list[Chunk]) -> Iterator[tuple[int, list[Encoded]]]:
        """The chunks' numbers and images, as the processes finish them."""
        encoder = Encoder(self.originals, self.options, self.folder, chunks, Turns())
        alive = os.pipe()
        processes = {}
        try:
            for _ in range(min(self.workers, len(chunks))):
                receive, send = FORK.Pipe(duplex=False)
                process = FORK.Process(target=encoder.run, args=(send, alive), daemon=True)
                process.start()
                # The process alone holds this end: reading ends when it does.
                send.close()
                processes[receive] = process
            yield from _received(processes)
        finally:
            for process in processes.values():
                # Not terminate: these processes ignore SIGTERM, and a shard without its name is made again anyway.
                process.kill()
                process.join()
            for descriptor in alive:
                os.close(descriptor)


def _received(processes: dict) -> Iterator[tuple[int, list[Encoded]]]:
    """What the processes send, until all have ended.  Raises OSError for one that failed."""
    left = dict(processes)
    while left:
        for connection in wait(list(left)):
            assert isinstance(connection, Connection)
            try:
                message = connection.recv()
            except EOFError:
                process = left.pop(connection)
                process.join()
                if process.exitcode:
                    raise OSError(
                        f"workers: a process ended with status {process.exitcode} (-9: killed, perhaps for its memory); {KEPT}"
                    ) from None
                continue
            if isinstance(message, str):
                raise OSError(f"dst: {message}; make room, {KEPT}")
            yield message


def _finish(originals: Originals, folder: Path, plan: dict, shards: list[list[Encoded]]) -> None:
    """Write the index and the manifest."""
    options, images = Options(**plan["options"]), [image for shard in shards for image in shard]
    index, files = _index(originals, options, images), {}
    for shard in range(len(shards)):
        rows = index.lying_in(shard)
        files[shard_name(shard)] = [int(index.bytes(options.pixels, rows).sum()), joined(index.crc[rows])]
    left_out = [[n, originals.name(n), image.reason] for n, image in enumerate(images) if image.reason]
    described = (plan["source_fingerprint"], len(images), plan["classes"], plan["versions"])
    entries = files | write_index(folder, index)
    write_manifest(folder, Manifest(options, originals.where, *described, entries, left_out))


def _index(originals: Originals, options: Options, images: list[Encoded]) -> Index:
    """Where the images lie, which are in the shards one after the other."""
    stored, original = (np.array([getattr(i, f) for i in images], np.int32) for f in ("stored", "original"))
    crc = np.array([image.crc for image in images], np.uint32)
    # In 64 bits: a shard of 16,384 images may be longer than the 2 GiB that an int32 offset reaches.
    counts = stored_bytes(options.pixels, *stored.astype(np.int64).T)
    shard = np.arange(len(images)) // options.shard_images
    offset = np.cumsum(counts) - counts
    # From the beginning of each image's shard.
    offset -= offset[shard * options.shard_images]
    # As in training from the originals: one that is unreadable there is not seen, and the one after it twice as often.
    shown = stand_ins(np.array([not image.reason for image in images]))
    names = PathTable("", [originals.name(index) for index in range(len(images))])
    where = (shard[shown].astype(np.int32), offset[shown], stored[shown], original[shown])
    return Index(*where, originals.labels[shown], crc[shown], names.ends, names.text)


def _remove_records(folder: Path) -> None:
    """Remove what only an unfinished build needs."""
    for path in [*folder.glob("shard-*.json"), folder / PLAN]:
        path.unlink(missing_ok=True)
    remove_temporaries(folder)
