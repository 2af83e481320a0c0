"""Staging: a cache is copied to a local disk once, whatever happens meanwhile."""

import errno
import os
import shutil
import threading
import time

import pytest

from mimir_fast.data import DataError
from mimir_fast.data.cache import staging
from mimir_fast.data.cache.format import Options, read_manifest
from mimir_fast.data.cache.staging import staged
from tests.support.caches import collect, same, stream
from tests.support.pictures import make_cache, write_pictures


@pytest.fixture(scope="module")
def caches(tmp_path_factory):
    """Folders {format: DST}."""
    root = tmp_path_factory.mktemp("caches")
    pictures = write_pictures(root / "pictures", 26)
    for name in ("rgb", "yuv420"):
        make_cache(pictures, root / name, Options("train", name, 24, 0, 8))
    return {name: root / name for name in ("rgb", "yuv420")}


@pytest.fixture
def copied(caches, tmp_path):
    shutil.copytree(caches["yuv420"], tmp_path / "dst")
    return tmp_path / "dst"


def test_staging_copies_once(caches, tmp_path, monkeypatch):
    expected = collect(stream(caches["yuv420"]))
    made = stream(caches["yuv420"], stage=tmp_path / "disk")
    assert same(collect(made), expected)
    assert str(tmp_path / "disk" / "train") in made.origin
    assert made.fingerprint == stream(caches["yuv420"]).fingerprint
    monkeypatch.setattr(staging, "_copy", lambda *arguments: 1 / 0)
    assert same(collect(stream(caches["yuv420"], stage=tmp_path / "disk")), expected)
    with pytest.raises(DataError, match=r"stage: .*disk/train holds another cache"):
        stream(caches["rgb"], stage=tmp_path / "disk")
    with pytest.raises(DataError, match=r"stage: .* is no cache"):
        staged(tmp_path, tmp_path / "disk", "train")
    # Validation images in files beside the cache of the training images stay where they are.
    assert staging.staged_if_cached(caches["rgb"], str(tmp_path / "disk"), "val") == caches["rgb"]


def test_staging_after_a_stop_and_from_a_damaged_cache(copied, tmp_path):
    disk = tmp_path / "disk" / "train"
    disk.mkdir(parents=True)
    (disk / "shard-00000.bin").write_bytes(b"of another cache")
    (disk / "shard-00001.bin.tmp").write_bytes(b"half")
    staged(copied, tmp_path / "disk", "train")
    assert sorted(path.name for path in disk.iterdir()) == sorted(path.name for path in (copied / "train").iterdir())
    shutil.rmtree(disk)
    with open(copied / "train" / "shard-00002.bin", "r+b") as file:
        file.write(b"\0\1\2")
    with pytest.raises(DataError, match=r"shard-00002.bin: image 16 .*damaged"):
        staged(copied, tmp_path / "disk", "train")
    assert not (disk / "manifest.json").exists()


def test_a_full_staging_disk(copied, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(staging, "free_bytes", lambda folder: 100)
        with pytest.raises(DataError, match=r"stage: .* has 0.0 GB free, .*without --stage"):
            staged(copied, tmp_path / "disk", "train")

    def full(source, name, manifest, index):
        yield b"some"
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(staging, "_blocks", full)
        with pytest.raises(OSError, match=r"stage: could not copy .*No space left.*make room"):
            staged(copied, tmp_path / "disk", "train")
    assert list((tmp_path / "disk" / "train").iterdir()) == []


def test_staging_that_is_interrupted_leaves_nothing_and_begins_again(copied, tmp_path, monkeypatch):
    """Ctrl-C, as the system raises it in the middle of a file."""

    def interrupted(source, name, manifest, index):
        yield b"some"
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(staging, "_blocks", interrupted)
        with pytest.raises(KeyboardInterrupt):
            staged(copied, tmp_path / "disk", "train")
    assert list((tmp_path / "disk" / "train").iterdir()) == []
    assert len(collect(stream(copied, stage=tmp_path / "disk"))[0]) == 6


def test_two_processes_of_a_machine_stage_once(copied, tmp_path, monkeypatch):
    """The second waits for the first and uses its copy."""
    copies, copy = [], staging._copy

    def slowly(*arguments):
        copies.append(arguments)
        time.sleep(0.3)
        copy(*arguments)

    monkeypatch.setattr(staging, "_copy", slowly)
    threads = [threading.Thread(target=staged, args=(copied, tmp_path / "disk", "train")) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(copies) == 1
    assert read_manifest(tmp_path / "disk" / "train") == read_manifest(copied / "train")
