"""Staging: a cache copied to a local disk before training, once per machine."""

import shutil
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from mimir_fast.checkpoints.atomic import in_place_when_done, remove_temporaries
from mimir_fast.checkpoints.lock import FolderInUseError, locked
from mimir_fast.data.cache.format import MANIFEST, Manifest, check_shards, find_cache, is_cache, read_manifest
from mimir_fast.data.cache.index import Index, check_image, read_index
from mimir_fast.data.errors import DataError, log

# Bytes of a read or write.
BLOCK = 16 * 2**20
SECONDS_BETWEEN_LINES = 10


def staged(data_root: str | Path, stage: Path, split: str) -> Path:
    """Copy a split's cache to stage/SPLIT and return `stage`, the data_root of the copy; one that is there is used.

    Of several processes of a machine the first copies and the others wait.  Raises DataError where data_root is no cache,
    another cache lies there, or it does not fit; OSError where the disk refuses.
    """
    source = find_cache(Path(data_root).expanduser(), split)
    if source is None:
        raise DataError(f"stage: {data_root} is no cache, which --stage copies; make one with mimir-fast cache")
    target, manifest = stage / split, read_manifest(source)
    with _waited_for(target):
        # Whole, since the manifest is copied last.
        if is_cache(target):
            if read_manifest(target).fingerprint != manifest.fingerprint:
                raise DataError(
                    f"stage: {target} holds another cache than {source}; remove it, or choose another folder"
                )
            check_shards(target, manifest)
            return stage
        _copy(source, target, manifest)
    return stage


def staged_if_cached(data_root: str | Path, stage: str, split: str) -> str | Path:
    """The data_root of a split's images: `stage` once their cache is copied there, data_root if it has none of them.

    stage   see `staged`; empty: nothing is copied
    """
    if not stage or find_cache(Path(data_root).expanduser(), split) is None:
        return data_root
    return staged(data_root, Path(stage).expanduser(), split)


def free_bytes(folder: Path) -> int:
    """Free space where a folder is, or will be."""
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


@contextmanager
def _waited_for(target: Path) -> Iterator[None]:
    """Context with the lock of the copy's folder, once whoever copies has finished."""
    with ExitStack() as held:
        while True:
            try:
                held.enter_context(locked(target, "stage"))
                break
            except FolderInUseError:
                time.sleep(0.5)
        yield


def _copy(source: Path, target: Path, manifest: Manifest) -> None:
    target.mkdir(parents=True, exist_ok=True)
    remove_temporaries(target)
    # Whole files of a copy that was stopped, maybe of another cache.
    for name in manifest.files:
        (target / name).unlink(missing_ok=True)
    # After the files of a stopped copy are gone, whose space counts as free.
    if manifest.bytes > (free := free_bytes(target)):
        raise DataError(
            f"stage: {target} has {free / 1e9:.1f} GB free, the cache takes {manifest.bytes / 1e9:.1f} GB; make room, "
            "or train without --stage"
        )
    check_shards(source, manifest)
    index, done, begun, told = read_index(source, manifest), 0, time.perf_counter(), time.perf_counter()
    try:
        for name in [*manifest.files, MANIFEST]:
            with in_place_when_done(target / name) as (temporary,), open(temporary, "wb") as file:
                for block in _blocks(source, name, manifest, index):
                    file.write(block)
                    done += len(block)
                    if (now := time.perf_counter()) - told >= SECONDS_BETWEEN_LINES:
                        told, left = now, (manifest.bytes - done) * (now - begun) / done
                        log.warning("stage: %.1f of %.1f GB, %.0f s left", done / 1e9, manifest.bytes / 1e9, left)
    except OSError as error:
        raise OSError(
            f"stage: could not copy {source} to {target}: {error}; make room, or train without --stage"
        ) from error


def _blocks(source: Path, name: str, manifest: Manifest, index: Index) -> Iterator[bytes]:
    """The contents of a file; those of a shard are compared with the images' checksums."""
    with open(source / name, "rb", buffering=BLOCK) as file:
        if name not in manifest.shards:
            yield file.read()
            return
        sizes = index.bytes(manifest.options.pixels)
        for image in index.lying_in(manifest.shards.index(name)).tolist():
            block = file.read(int(sizes[image]))
            check_image(source / name, image, index, block)
            yield block
