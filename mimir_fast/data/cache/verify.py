"""Verifying a cache: every checksum."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from mimir_fast.data.cache.format import AGAIN, Manifest, check_shards, read_manifest, shard_name
from mimir_fast.data.cache.index import Index, check_image, joined, read_index
from mimir_fast.data.errors import DataError

# Bytes of a read.
BLOCK = 32 * 2**20


def verify(folder: Path, threads: int, show: Callable[[int, int], None]) -> int:
    """Check the manifest, the index and every image, the shards by so many threads; returns the number of images.

    show   called with the images done and the images in all
    Raises DataError naming the first file that is damaged, for an image its shard, index and name in the source.
    """
    manifest = read_manifest(folder)
    check_shards(folder, manifest)
    index = read_index(folder, manifest)
    done = 0
    # Threads do: reading and zlib.crc32 release the interpreter's lock.
    with ThreadPoolExecutor(threads) as pool:
        shards = range(len(manifest.shards))
        try:
            for count in pool.map(lambda shard: check_shard(folder, manifest, index, shard), shards):
                done += count
                show(done, len(index))
        finally:
            pool.shutdown(cancel_futures=True)
    return len(index)


def check_shard(folder: Path, manifest: Manifest, index: Index, shard: int) -> int:
    """Check the images of one shard; returns how many there are.  Raises DataError naming the first that is damaged."""
    path = folder / shard_name(shard)
    images, sizes = index.lying_in(shard), index.bytes(manifest.options.pixels)
    if joined(index.crc[images]) != manifest.files[path.name][1]:
        raise DataError(f"{path}: its checksum in the manifest is not that of the index; {AGAIN}")
    # In large reads from end to end, which disks and networks are fastest at.
    with path.open("rb", buffering=BLOCK) as file:
        for image in images.tolist():
            check_image(path, image, index, file.read(int(sizes[image])))
    # With those that another image stands for, so that the shards add up to all images of the index.
    return int((index.shard == shard).sum())
