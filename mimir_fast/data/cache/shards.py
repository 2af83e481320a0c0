"""Reading shards: open files of a cache, read by any number of threads and forked processes."""

import errno
import os
import threading
from dataclasses import dataclass
from pathlib import Path

from mimir_fast.data.cache.format import AGAIN, Manifest, check_shards, read_manifest, shard_name
from mimir_fast.data.cache.index import Index, read_index
from mimir_fast.data.errors import DataError

# Errors of a disk or a network file system that opening the file again may cure.
REOPENED = (errno.ESTALE, errno.EIO)


@dataclass(frozen=True)
class Cache:
    """An open cache."""

    folder: Path
    manifest: Manifest
    index: Index
    shards: "Shards"


def open_cache(folder: Path) -> Cache:
    """Open a cache, all of its files.  Raises DataError naming the file that is damaged, missing or of another size."""
    manifest = read_manifest(folder)
    check_shards(folder, manifest)
    return Cache(folder, manifest, read_index(folder, manifest), Shards(folder, manifest))


class Shards:
    """The open shards of a cache: removed meanwhile they can still be read."""

    # Not a memory map: where a mapped file has become shorter, reading it kills the process.
    def __init__(self, folder: Path, manifest: Manifest):
        self.descriptors: list[int] = []
        self.folder, self.manifest = folder, manifest
        self.lock = threading.Lock()
        try:
            for shard in range(len(manifest.shards)):
                self.descriptors.append(self._open(shard))
        except OSError as error:
            self.close()
            advice = (
                f"raise the limit (ulimit -n) above {len(manifest.shards) + 64}"
                if error.errno == errno.EMFILE
                else AGAIN
            )
            raise DataError(f"{error.filename}: cannot be opened ({error.strerror}); {advice}") from error

    def path(self, shard: int) -> Path:
        """The file of a shard."""
        return self.folder / shard_name(shard)

    def read(self, shard: int, offset: int, into: memoryview) -> None:
        """Fill `into` with the bytes of a shard from an offset on.

        Raises DataError naming the file if it ends before, if it cannot be read even once it was opened again, or if another
        cache has taken its place.
        """
        descriptor = self.descriptors[shard]
        try:
            self._fill(descriptor, shard, offset, into)
        except OSError as error:
            if error.errno not in REOPENED:
                raise DataError(f"{self.path(shard)}: cannot be read ({error.strerror})") from error
            self._reopen(shard, descriptor)
            try:
                self._fill(self.descriptors[shard], shard, offset, into)
            except OSError as again:
                raise DataError(
                    f"{self.path(shard)}: cannot be read, opened again neither ({again.strerror})"
                ) from again

    def _fill(self, descriptor: int, shard: int, offset: int, into: memoryview) -> None:
        # With the place in the call: threads and forked processes read from one descriptor without a lock.
        done = os.preadv(descriptor, [into], offset)
        while done < len(into):
            count = os.preadv(descriptor, [into[done:]], offset + done)
            if count == 0:
                raise DataError(
                    f"{self.path(shard)}: ends {len(into) - done} bytes before the end of an image; it was cut off, {AGAIN}"
                )
            done += count

    def _open(self, shard: int) -> int:
        return os.open(self.path(shard), os.O_RDONLY)

    def _reopen(self, shard: int, failed: int) -> None:
        """Open a shard again, unless another thread has done so."""
        with self.lock:
            if self.descriptors[shard] != failed:
                return
            try:
                if read_manifest(self.folder).fingerprint != self.manifest.fingerprint:
                    raise DataError(f"{self.folder}: another cache has taken its place; start the run again to use it")
                # The old descriptor stays open: threads may be reading from it.
                self.descriptors[shard] = self._open(shard)
            except OSError as error:
                raise DataError(f"{self.path(shard)}: cannot be opened again ({error.strerror})") from error

    def close(self) -> None:
        """Close the files; may be called again."""
        while self.descriptors:
            # Each number is forgotten before it is closed: closed twice, it could be another file's by then.
            os.close(self.descriptors.pop())

    def __reduce__(self):
        # For workers that are not forked: they open the files themselves.
        return Shards, (self.folder, self.manifest)

    def __del__(self):
        self.close()
