"""Building a cache: what it holds, the same bytes however it was made, and every fault in one line."""

import errno
import filecmp
import json
import os
import signal
import subprocess
import sys
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mimir_fast.checkpoints.lock import NAME as LOCK
from mimir_fast.checkpoints.lock import locked
from mimir_fast.cli.cache import main
from mimir_fast.data import DataError
from mimir_fast.data.cache import build, encoding, plan
from mimir_fast.data.cache.format import Options, read_manifest
from mimir_fast.data.cache.index import read_index
from mimir_fast.data.cache.originals import open_originals
from mimir_fast.data.cache.pixels import reduced, to_image, to_pixels
from mimir_fast.data.cache.plan import estimated_bytes
from tests.support.pictures import make_cache, picture, stored, write_pictures

SMALL = Options("train", "yuv420", 24, 0, 8)


@pytest.fixture(autouse=True)
def _tolerant(monkeypatch):
    """Two unreadable images are tolerated, of 200 as of 22."""
    monkeypatch.setattr("mimir_fast.data.errors.BadFiles.__init__", _many)


def _many(self, where, num_images):
    self.where, self.num_images, self.limit, self.reasons = where, num_images, 2, {}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return write_pictures(tmp_path_factory.mktemp("pictures"), unreadable=(5, 21))


def make(pictures, dst, options=SMALL, workers=1, show=lambda done, total: None):
    return make_cache(pictures, dst, options, workers, show)


def same_files(one: Path, other: Path) -> bool:
    names = sorted(path.name for path in one.iterdir())
    assert names == sorted(path.name for path in other.iterdir())
    return filecmp.cmpfiles(one, other, names, shallow=False)[0] == names


@pytest.fixture(scope="module")
def cache(pictures, tmp_path_factory):
    """The cache of the pictures, made by one process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mimir_fast.data.errors.BadFiles.__init__", _many)
        dst = tmp_path_factory.mktemp("cache")
        make(pictures, dst)
    return dst / "train"


def test_every_image_is_there_as_training_names_it(pictures, cache):
    """Reduced, in row pairs, under the index of the folder's image; the next readable one stands for an unreadable one."""
    source, manifest = open_originals(pictures, "train"), read_manifest(cache)
    index = read_index(cache, manifest)
    assert len(index) == len(source) == manifest.num_images == 22
    for image in range(22):
        shown = {5: 6, 21: 0}.get(image, image)
        original = source.read(shown, ycc=True)
        small = reduced(original, 24)
        assert stored(cache, image) == to_pixels(small, "yuv420").tobytes()
        assert index.stored[image].tolist() == [small.height, small.width]
        assert index.original[image].tolist() == [original.height, original.width]
        assert index.label[image] == source.labels[shown]
        assert index.crc[image] == zlib.crc32(stored(cache, image))
        assert index.names().relative(image) == source.name(image)
    assert index.stored[3].tolist() == [24, 480]
    assert index.stored[2].tolist() == [1, 1]
    assert manifest.left_out == [[5, "ant/005.jpg", "not an image"], [21, "bee/021.jpg", "not an image"]]
    assert manifest.classes == ["ant", "bee"]
    shards = [path for path in cache.glob("shard-*.bin")]
    assert len(shards) == 3
    assert {path.name: path.stat().st_size for path in shards}.items() <= {
        k: v[0] for k, v in manifest.files.items()
    }.items()
    assert sum(path.stat().st_size for path in shards) == int(np.delete(index.bytes("yuv420"), [5, 21]).sum())
    assert sorted(path.name for path in cache.parent.iterdir()) == ["train"]  # no lock is left


def test_an_image_comes_back(pictures, cache):
    index = read_index(cache, read_manifest(cache))
    for image in (0, 2, 4, 20):
        data = np.frombuffer(stored(cache, image), np.uint8)
        shown = np.asarray(to_image(data, "yuv420", *index.stored[image].tolist()), float)
        small = np.asarray(reduced(open_originals(pictures, "train").read(image), 24), float)
        assert shown.shape == small.shape
        assert np.abs(shown - small).mean() < 4


@pytest.mark.parametrize("workers", [2, 5])
def test_the_same_bytes_by_any_number_of_processes(pictures, cache, tmp_path, workers, monkeypatch):
    monkeypatch.setattr(encoding, "CHUNK", 3)
    monkeypatch.setattr(build, "CHUNK", 3)
    monkeypatch.setattr(encoding, "PIECE", 2000)
    make(pictures, tmp_path, workers=workers)
    assert same_files(cache, tmp_path / "train")


class StoppedError(Exception):
    pass


@pytest.mark.parametrize("after", [4, 12, 20])
def test_the_same_bytes_after_a_stop(pictures, cache, tmp_path, after, monkeypatch):
    """Whole shards are kept: they are not encoded again."""
    monkeypatch.setattr(encoding, "CHUNK", 2)
    monkeypatch.setattr(build, "CHUNK", 2)

    def stop(done, total):
        if done >= after:
            raise StoppedError

    with pytest.raises(StoppedError):
        make(pictures, tmp_path, show=stop)
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "train").glob("shard-*.bin")}
    assert len(kept) == after // 8
    first = []
    make(pictures, tmp_path, workers=2, show=lambda done, total: first.append(done))
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert first[after // 8 - 1] == after // 8 * 8 if kept else True
    assert same_files(cache, tmp_path / "train")


def test_a_finished_cache_stays(pictures, cache, monkeypatch):
    before = {path.name: path.stat().st_mtime_ns for path in cache.iterdir()}
    make(pictures, cache.parent)
    assert {path.name: path.stat().st_mtime_ns for path in cache.iterdir()} == before


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (Options("train", "rgb", 24, 0, 8), "format: .*yuv420, not rgb"),
        (Options("train", "yuv420", 16, 0, 8), "size: .*24, not 16"),
        (Options("train", "yuv420", 24, 0, 9), "shard_images: .*8, not 9"),
    ],
)
def test_other_options_are_refused(pictures, cache, options, named):
    with pytest.raises(DataError, match=named) as caught:
        make(pictures, cache.parent, options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("finished", [False, True])
def test_a_source_that_changed_is_refused(tmp_path, finished):
    source = write_pictures(tmp_path / "source", unreadable=(5, 21))

    def stop(done, total):
        if not finished and done >= 8:
            raise StoppedError

    if finished:
        make(source, tmp_path / "dst")
    else:
        with pytest.raises(StoppedError):
            make(source, tmp_path / "dst", show=stop)
    picture(99, 20, 20).save(source / "train" / "ant" / "000.jpg")
    with pytest.raises(DataError, match=r"src: .*other images than .*dst/train"):
        make(source, tmp_path / "dst")
    (source / "train" / "ant").rename(source / "train" / "asp")
    with pytest.raises(DataError, match=r"src: .*other classes"):
        make(source, tmp_path / "dst")


def test_a_build_by_another_version_is_not_gone_on_with(pictures, tmp_path, monkeypatch):
    def stop(done, total):
        raise StoppedError

    with pytest.raises(StoppedError):
        make(pictures, tmp_path, show=stop)
    monkeypatch.setattr(plan, "pillow", "1.0")
    with pytest.raises(DataError, match=r"begun with .*'pillow'.*remove it"):
        make(pictures, tmp_path)


def test_other_files_are_left_alone(pictures, tmp_path):
    (tmp_path / "train" / "ant").mkdir(parents=True)
    with pytest.raises(DataError, match="holds other files"):
        make(pictures, tmp_path)


def test_a_second_build_names_the_first_and_a_dead_ones_lock_is_taken_over(pictures, cache, tmp_path):
    folder = tmp_path / "train"
    with (
        locked(folder, "dst"),
        pytest.raises(ValueError, match=rf"dst: {folder} is in use by process {os.getpid()} on \S+"),
    ):
        make(pictures, tmp_path)
    with locked(tmp_path / "other", "dst"):
        lock = json.loads((tmp_path / "other" / LOCK).read_text())
    (folder / LOCK).write_text(json.dumps(lock | {"process": 2**22 + 1}))
    make(pictures, tmp_path)
    assert same_files(cache, folder)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_one_line_and_the_same_command_goes_on(pictures, cache, tmp_path, monkeypatch, number):
    write_at = encoding.write_at

    def full(path, offset, parts):
        if path.name.startswith("shard-00001"):
            raise OSError(number, os.strerror(number))
        write_at(path, offset, parts)

    with monkeypatch.context() as patch:
        patch.setattr(encoding, "write_at", full)
        with pytest.raises(
            OSError, match=r"dst: could not write .*shard-00001.bin: .*make room.*same command"
        ) as caught:
            make(pictures, tmp_path)
    assert "\n" not in str(caught.value)
    make(pictures, tmp_path)
    assert same_files(cache, tmp_path / "train")


def test_too_little_space_is_said_first(pictures, tmp_path, monkeypatch):
    monkeypatch.setattr(plan, "free_bytes", lambda folder: 1000)
    with pytest.raises(DataError, match=r"dst: .* needs about .* GB more, 0.0 GB are free"):
        make(pictures, tmp_path)


def test_the_size_is_known_beforehand(pictures, cache):
    found = sum(path.stat().st_size for path in cache.glob("shard-*"))
    assert estimated_bytes(open_originals(pictures, "train"), SMALL) == pytest.approx(found, rel=0.1)


def test_a_killed_process_ends_the_build(pictures, cache, tmp_path, monkeypatch):
    encode = encoding.encode

    def killed(originals, index, options):
        if index == 13:
            os.kill(os.getpid(), signal.SIGKILL)
        return encode(originals, index, options)

    with monkeypatch.context() as patch:
        patch.setattr(encoding, "encode", killed)
        with pytest.raises(OSError, match="status -9"):
            make(pictures, tmp_path, workers=3)
    make(pictures, tmp_path)
    assert same_files(cache, tmp_path / "train")


def test_too_many_unreadable_images(tmp_path):
    source = write_pictures(tmp_path / "source", unreadable=(5, 21))
    (source / "train" / "ant" / "001.jpg").write_bytes(b"")
    with pytest.raises(DataError, match="at least 3 of 22 images are unreadable"):
        make(source, tmp_path / "dst")


def test_an_image_of_too_many_pixels_is_left_out(tmp_path):
    for number in range(3):
        (tmp_path / "train" / "ant").mkdir(parents=True, exist_ok=True)
        picture(number, 20, 20).save(tmp_path / "train" / "ant" / f"{number}.png")
    Image.new("1", (20_000, 9000)).save(tmp_path / "train" / "ant" / "1.png")
    manifest = make(tmp_path, tmp_path / "dst")
    ((index, name, reason),) = manifest.left_out
    assert (index, name) == (1, "ant/1.png")
    assert "DecompressionBombError" in reason


def test_the_verb(pictures, cache, tmp_path, capsys):
    words = [str(pictures), str(tmp_path), *"--size 24 --shard_images 8 --workers 2".split()]
    # In a thread, which may not ask for signals; planted: cache's main asks for SIGTERM wherever it runs.
    with ThreadPoolExecutor(1) as thread:
        assert thread.submit(main, [*words, "--dry_run"]).result() == 0
    assert "22 images in 2 classes" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())
    assert main([*words, "--verify"]) == 0
    assert "22 images, all whole" in capsys.readouterr().out
    assert same_files(cache, tmp_path / "train")
    for wrong, named in (
        (["--split", "val", "--size", "3"], "size"),
        (["--split", "val", "--format", "yuv420"], "format"),
        (["--format", "yuv422"], "format"),
        (["--shard_images", "0"], "shard_images"),
    ):
        assert main([*words[:2], *wrong]) == 2
        assert f"error: {named}: " in capsys.readouterr().err
    assert main([str(tmp_path)]) == 2
    assert "dst: none" in capsys.readouterr().err


SLOWLY = """
import sys, time
from mimir_fast.data.cache import build, encoding
encode = encoding.encode
def slow(*arguments):
    time.sleep(0.02)
    return encode(*arguments)
encoding.encode = slow
encoding.CHUNK = build.CHUNK = 2
from mimir_fast.checkpoints.lock import NAME as LOCK
from mimir_fast.checkpoints.lock import locked
from mimir_fast.cli.cache import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "status"),
    [(signal.SIGKILL, -9), (signal.SIGINT, 130), (signal.SIGTERM, 143)],
    ids=["KILL", "INT", "TERM"],
)
def test_signals_keep_whole_shards_and_leave_no_process(tmp_path, number, status):
    source = write_pictures(tmp_path / "source", 206, unreadable=(5, 205))
    words = [str(source), str(tmp_path / "dst"), *"--size 24 --shard_images 8 --workers 2".split()]
    child = subprocess.Popen(
        [sys.executable, "-c", SLOWLY, *words],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    folder = tmp_path / "dst" / "train"
    deadline = time.monotonic() + 1800
    while not list(folder.glob("shard-0000[1-9].bin")):
        assert time.monotonic() < deadline
        assert child.poll() is None, child.stderr.read()
        time.sleep(0.01)
    os.killpg(child.pid, number) if number == signal.SIGINT else os.kill(child.pid, number)
    error = child.communicate(timeout=1800)[1].decode()
    assert child.returncode == status, error
    assert number == signal.SIGKILL or "whole shards are kept" in error
    assert "Traceback" not in error
    for _ in range(500):  # the processes of the build end with it
        try:
            os.killpg(child.pid, 0)
        except ProcessLookupError:
            break
        time.sleep(0.01)
    else:
        raise AssertionError("a process is left")
    assert not (folder / "manifest.json").exists()
    make(source, tmp_path / "dst", workers=2)
    make(source, tmp_path / "again")
    assert same_files(tmp_path / "again" / "train", folder)
