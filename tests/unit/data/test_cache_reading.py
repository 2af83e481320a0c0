"""Reading a cache: the same crops as from image files, whatever the threads; every fault in one line that names the file."""

import errno
import gc
import os
import resource
import shutil
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from mimir_fast.data import Augment, DataError, build_train_data, eval_batches, prefetch, to_float
from mimir_fast.data.batch_order import ShuffleSchedule
from mimir_fast.data.boxes import boxes, draw
from mimir_fast.data.cache import reader, shards
from mimir_fast.data.cache.format import Options, read_manifest, shard_name
from mimir_fast.data.cache.index import read_index
from mimir_fast.data.cache.shards import open_cache
from mimir_fast.data.cache.windows import windows
from mimir_fast.data.datasets import read_images
from mimir_fast.kernels import crop_resize, crop_resize_yuv420
from tests.support.caches import collect, same, stream
from tests.support.pictures import make_cache, write_pictures

FORMATS = {
    "rgb": Options("train", "rgb", 0, 0, 8),
    "yuv420": Options("train", "yuv420", 24, 0, 8),
}
IMAGES = 26


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    root = write_pictures(tmp_path_factory.mktemp("pictures"), IMAGES)
    return write_pictures(root, 8, split="val")


@pytest.fixture(scope="module")
def caches(pictures, tmp_path_factory):
    """Folders {format: DST}."""
    root = tmp_path_factory.mktemp("caches")
    for name, options in FORMATS.items():
        make_cache(pictures, root / name, options)
    return {name: root / name for name in FORMATS}


@pytest.mark.parametrize("pixels", FORMATS)
def test_the_same_crops_as_from_image_files(pictures, caches, pixels):
    """Same order, labels, boxes and flips; pixels differ by rounding, in yuv420 at a smaller size by more."""
    ours, theirs = (collect(stream(root, seed=3), epoch=2) for root in (caches[pixels], pictures))
    assert torch.equal(ours[1], theirs[1])
    assert ours[0].shape == theirs[0].shape
    assert ours[0].dtype == torch.uint8
    difference = (ours[0].int() - theirs[0].int()).abs().float().mean((2, 3, 4))
    assert difference.max() < (0.5 if pixels == "rgb" else 9)
    other = collect(stream(caches[pixels], seed=4), epoch=2)[0]
    assert (ours[0].int() - other.int()).abs().float().mean() > 20


@pytest.mark.parametrize("pixels", FORMATS)
def test_crops_are_those_of_the_whole_image_at_its_scaled_box(caches, pixels):
    cache = open_cache(caches[pixels] / "train")
    index, op = cache.index, crop_resize if pixels == "rgb" else crop_resize_yuv420
    made = stream(caches[pixels], batch_size=IMAGES, seed=1)
    (order,) = ShuffleSchedule(IMAGES, IMAGES, seed=1).batches(0)
    drawn = draw(1, 0, order)
    found, _ = next(made.epoch(0))
    for n, image in enumerate(order.tolist()):
        height, width = index.original[image].tolist()
        (box,) = boxes(drawn.numbers[n : n + 1], [height], [width])
        box = box * np.tile(index.stored[image] / [height, width], 2)
        data = np.empty(int(index.bytes(pixels, image)), np.uint8)
        cache.shards.read(int(index.shard[image]), int(index.offset[image]), data.data)
        sizes, flip = torch.from_numpy(index.stored[image][None].astype(np.int64)), torch.tensor([bool(drawn.flips[n])])
        box = torch.from_numpy(box[None].astype(np.float32))
        expected = op(torch.from_numpy(data), torch.tensor([0]), sizes, box, flip, 16, dtype=torch.uint8)[0]
        assert (found[n].int() - expected.int()).abs().max() <= 1
        assert (found[n] == expected).float().mean() > 0.99


def test_only_the_rows_of_the_boxes_are_read(caches):
    """In the second epoch; in the first whole images, whose checksums are compared."""
    made = stream(caches["yuv420"], batch_size=IMAGES)
    counts = []
    real = os.preadv

    def counted(descriptor, views, offset):
        counts.append(sum(map(len, views)))
        return real(descriptor, views, offset)

    index, (order,) = (
        read_index(caches["yuv420"] / "train", read_manifest(caches["yuv420"] / "train")),
        [np.arange(IMAGES)],
    )
    sizes = index.bytes("yuv420")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "preadv", counted)
        list(made.epoch(0))
        assert sorted(counts) == sorted(sizes.tolist())
        counts.clear()
        list(made.epoch(1))
    expected = windows(index, "yuv420", order, index.label, order, 0, 1).counts
    assert sorted(counts) == sorted(expected.tolist())
    assert sum(counts) < 0.9 * sizes.sum()


@pytest.mark.parametrize("pixels", FORMATS)
def test_threads_and_resuming_do_not_change_a_bit(caches, pixels):
    before = set(threading.enumerate())
    alone = stream(caches[pixels], data_threads=1)
    whole = [collect(alone, epoch) for epoch in range(2)]
    assert len(whole[0][0]) == 6
    for threads in (3, 8):
        helped = stream(caches[pixels], data_threads=threads)
        assert all(same(collect(helped, epoch), whole[epoch]) for epoch in range(2))
        abandoned = helped.epoch(0)
        next(abandoned)
        for start in (4, 1, 0):
            assert same(collect(helped, 1, start), [part[start:] for part in whole[1]])
        assert list(abandoned) == []
        helped.close()
        with pytest.raises(RuntimeError, match="closed"):
            helped.epoch(0)
    for start in range(6):
        assert same(collect(stream(caches[pixels]), 1, start), [part[start:] for part in whole[1]])
    assert not [thread for thread in set(threading.enumerate()) - before if not thread.daemon]


def test_any_number_of_processes_sees_the_same_crops(caches):
    """A global batch of six: three on each of two, or six on one."""
    (images, labels) = collect(stream(caches["rgb"], batch_size=6))
    parts = [collect(stream(caches["rgb"], batch_size=3, rank=rank, world_size=2)) for rank in (0, 1)]
    assert torch.equal(torch.cat([part[0] for part in parts], dim=1), images)
    assert torch.equal(torch.cat([part[1] for part in parts], dim=1), labels)


def test_prefetch_on_the_cpu(caches):
    made = stream(caches["rgb"])
    whole = collect(made)
    batches = list(prefetch(made.epoch(0), torch.device("cpu")))
    assert torch.equal(torch.stack([images for images, _ in batches]), to_float(whole[0]))
    place = torch.empty(4, 3, 16, 16)
    for number, (images, _) in enumerate(prefetch(made.epoch(0), torch.device("cpu"), lambda shape: place)):
        assert images is place
        assert torch.equal(images, batches[number][0])
    assert torch.equal(torch.stack([labels for _, labels in batches]), whole[1])


def test_a_batch_larger_than_its_buffer(caches, monkeypatch):
    whole = collect(stream(caches["yuv420"]))
    monkeypatch.setattr(reader.Buffer, "__init__", lambda self, batch, room, pin: small(self, batch, pin))
    small_buffers = collect(stream(caches["yuv420"]))
    assert same(small_buffers, whole)


def small(self, batch_size, pin_memory):
    self.batch_size, self.pin_memory, self.copied = batch_size, pin_memory, None
    self._allocate(300)


def test_an_image_that_was_left_out_is_counted_when_it_is_met(tmp_path, caplog):
    source = write_pictures(tmp_path / "source", unreadable=(7,))
    make_cache(source, tmp_path / "dst", FORMATS["rgb"])
    made, theirs = stream(tmp_path / "dst", batch_size=22), stream(source, batch_size=22)
    assert made.bad_files == {}
    ours, expected = collect(made), collect(theirs)
    assert torch.equal(ours[1], expected[1])
    assert (ours[0].int() - expected[0].int()).abs().float().mean((2, 3, 4)).max() < 0.5
    assert made.bad_files == {"ant/007.jpg": "not an image"}
    # what stands for it is one of the images that are trained on
    held = read_images("imagefolder", tmp_path / "dst").select(np.array([6, 7, 20]))
    assert held.shown.tolist() == [6, 20, 20]


def test_fine_tuning_takes_cached_pixels(pictures, caches):
    augment = Augment("rand-m9-mstd0.5-inc1", reprob=0.25)
    ours, theirs = (
        collect(build_train_data("imagefolder", root, 16, 4, augment=augment, seed=2))
        for root in (caches["rgb"], pictures)
    )
    assert same(ours, theirs)
    small_ones = collect(build_train_data("imagefolder", caches["yuv420"], 16, 4, augment=Augment(), num_workers=2))
    assert small_ones[0].shape == ours[0].shape


def test_evaluation_is_the_same_to_the_last_bit(pictures, tmp_path):
    make_cache(pictures, tmp_path, Options("val", "rgb", 0, 28, 4))
    ours, theirs = (eval_batches("imagefolder", root, 28, 3, num_workers=1) for root in (tmp_path, pictures))
    assert ours.classes == theirs.classes
    for (images, labels), (expected, targets) in zip(ours, theirs, strict=True):
        assert torch.equal(images, expected)
        assert torch.equal(labels, targets)
    with pytest.raises(DataError, match=r"input_size: 32, but .* was made for 28.*--input_size 32"):
        eval_batches("imagefolder", tmp_path, 32, 3)
    (tmp_path / "list.txt").write_text("bee/005.jpg\nant/001.jpg\n")
    listed = [
        next(iter(eval_batches("imagefolder", root, 28, 2, image_list=tmp_path / "list.txt")))
        for root in (tmp_path, pictures)
    ]
    assert same(*listed)
    (tmp_path / "list.txt").write_text("bee/005.jpg\nant/009.jpg\n")
    with pytest.raises(DataError, match=r"1 of 2 images are not in .*first ant/009.jpg"):
        eval_batches("imagefolder", tmp_path, 28, 2, image_list=tmp_path / "list.txt")


def test_evaluation_refuses_what_was_left_out(tmp_path):
    source = write_pictures(tmp_path / "source", 8, split="val", unreadable=(3,))
    make_cache(source, tmp_path / "dst", Options("val", "rgb", 0, 28, 4))
    with pytest.raises(DataError, match=r"ant/003.jpg \(not an image\)"):
        list(eval_batches("imagefolder", tmp_path / "dst", 28, 3))


def test_held_out_images_come_from_the_training_cache(caches):
    held = eval_batches("imagefolder", caches["rgb"], 16, 8, split="held_out", held_out=5)
    assert sum(len(labels) for _, labels in held) == 5


def test_what_is_no_cache_or_not_finished(caches, tmp_path):
    with pytest.raises(DataError, match=r"dataset: .* is a cache, expected one of imagenet, .*, got cifar10"):
        read_images("cifar10", caches["rgb"])
    assert len(read_images("imagenet", caches["rgb"] / "train")) == IMAGES
    shutil.copytree(caches["rgb"], tmp_path / "dst")
    (tmp_path / "dst" / "train" / "manifest.json").unlink()
    with pytest.raises(DataError, match=r"dst/train: a cache that is not finished \(no manifest.json\)"):
        stream(tmp_path / "dst")


@pytest.fixture
def copied(caches, tmp_path):
    shutil.copytree(caches["yuv420"], tmp_path / "dst")
    return tmp_path / "dst"


def failed(made, epoch=0) -> str:
    """The one line with which reading an epoch fails."""
    with pytest.raises(DataError) as caught:
        list(made.epoch(epoch))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_shard_cut_off_before_or_under_a_run(copied):
    made, path = stream(copied), copied / "train" / shard_name(1)
    os.truncate(path, 100)
    assert f"{path}: ends " in failed(made)
    with pytest.raises(DataError, match=rf"{path}: 100 bytes, the manifest says"):
        stream(copied)


def test_a_flipped_bit_in_an_image(copied):
    index = read_index(copied / "train", read_manifest(copied / "train"))
    path = copied / "train" / shard_name(int(index.shard[9]))
    with open(path, "r+b") as file:
        file.seek(int(index.offset[9]) + 50)
        byte = file.read(1)
        file.seek(-1, 1)
        file.write(bytes([byte[0] ^ 1]))
    assert f"{path}: image 9 (ant/009.jpg) is damaged" in failed(stream(copied, batch_size=IMAGES))


def test_a_cache_deleted_under_a_run(copied):
    made = stream(copied)
    next(made.epoch(0))
    shutil.rmtree(copied)
    assert len(collect(made, 1)[0]) == 6
    with pytest.raises(DataError, match="no such folder"):
        stream(copied)


def interrupted(monkeypatch, number: int, times: int):
    """The next reads fail so many times."""
    left, real = [times], os.preadv

    def failing(descriptor, views, offset):
        if left[0]:
            left[0] -= 1
            raise OSError(number, os.strerror(number))
        return real(descriptor, views, offset)

    monkeypatch.setattr(os, "preadv", failing)


@pytest.mark.parametrize("number", [errno.ESTALE, errno.EIO])
def test_a_file_is_opened_again_once(copied, monkeypatch, number):
    expected = collect(stream(copied))
    made = stream(copied, data_threads=1)
    interrupted(monkeypatch, number, 1)
    assert same(collect(made), expected)
    interrupted(monkeypatch, number, 2)
    error = failed(made, 1)
    assert str(copied / "train" / "shard-") in error
    assert "opened again neither" in error
    assert os.strerror(number) in error


def test_another_cache_in_its_place(copied, caches, monkeypatch):
    made = stream(copied, data_threads=1)
    shutil.rmtree(copied)
    shutil.copytree(caches["rgb"], copied)
    interrupted(monkeypatch, errno.ESTALE, 1)
    assert f"{copied / 'train'}: another cache has taken its place" in failed(made)


def test_a_dead_thread_is_an_error(caches, monkeypatch):
    made = stream(caches["rgb"], data_threads=2)
    monkeypatch.setattr(reader.Reader, "read", lambda self, part, scratch: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        next(made.epoch(0))
    monkeypatch.setattr(reader.Epoch, "_work", lambda self: None)
    with pytest.raises(DataError, match="data_threads: all threads that read have ended"):
        next(made.epoch(0))


@pytest.mark.parametrize("stopped", [False, True])
def test_a_stuck_thread_is_an_error(caches, monkeypatch, stopped):
    """Also where the run was told to end meanwhile: it does not wait until the thread counts as stuck."""
    made, answer = stream(caches["rgb"]), threading.Event()
    made.interrupted = lambda: stopped
    monkeypatch.setattr(reader, "STUCK_AFTER", 60 if stopped else 0.5)
    monkeypatch.setattr(shards.Shards, "read", lambda self, shard, offset, into: answer.wait(90))
    monkeypatch.setattr(reader, "PATIENCE", 0.1)
    buffers = made._loader.reader.buffers
    try:
        assert ("stopped while no image could be read" if stopped else "does not answer") in failed(made)
    finally:
        answer.set()
    # the threads may wake up and write: not into the buffers of the next epoch
    assert not set(map(id, buffers)) & set(map(id, made._loader.reader.buffers))


def test_few_open_files_suffice_and_too_few_are_said(caches):
    """As many as there are shards, and no more while reading."""
    gc.collect()
    before = set(map(int, os.listdir("/proc/self/fd")))
    made = stream(caches["rgb"], data_threads=8)
    list(made.epoch(0))
    assert len(os.listdir("/proc/self/fd")) <= len(before) + 4
    del made
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    # room for two more, and for the descriptor that listing took; a cache has four shards
    second = [number for number in range(max(before) + 9) if number not in before][1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (second + 1, hard))
    try:
        with pytest.raises(DataError, match=r"shard-0000\d.bin: cannot be opened .*ulimit -n"):
            stream(caches["rgb"])
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_256_open_files_and_no_shared_memory_suffice_for_imagenet(tmp_path):
    """79 shards, as many as ImageNet-1K has."""
    make_cache(write_pictures(tmp_path / "source", 79), tmp_path / "dst", Options("train", "yuv420", 24, 0, 1))
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, limits[1]))
    try:
        before = shared_memory()
        made = stream(tmp_path / "dst", batch_size=8, data_threads=8)
        batches = made.epoch(0)
        next(batches)
        assert shared_memory() == before
        assert len(list(batches)) == 8
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def shared_memory() -> list[str]:
    """What this process maps of /dev/shm, and of memory without a name that torch sends to others."""
    maps = Path("/proc/self/maps").read_text().splitlines()
    return [line for line in maps if "/dev/shm" in line or "/torch_" in line or "memfd:" in line]
