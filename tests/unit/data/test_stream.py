"""Batches are a function of (seed, epoch, step, rank): workers, resuming and global random state do not matter."""

import multiprocessing
import random
import subprocess
import sys

import numpy as np
import pytest
import torch

from mimir_fast.data import BatchStream, DataError, build_pretrain_data
from mimir_fast.data.batch_order import BatchKey, ShuffleSchedule
from mimir_fast.data.datasets import dataset_info, read_images
from mimir_fast.data.sources import ArrayImages
from mimir_fast.data.workers import BatchMaker
from tests.unit.data.test_layouts import write_cifar10, write_classes


@pytest.fixture(scope="module", params=["array", "folder", "mixed"])
def build(request, tmp_path_factory):
    """A function of keyword arguments that builds a stream of 20 images, batches of 4."""
    root = tmp_path_factory.mktemp(request.param)
    extra = {}
    if request.param == "folder":
        write_classes(root, 10, 48)
        return lambda **flags: build_pretrain_data("imagefolder", root, 16, 4, **flags)
    write_cifar10(root)
    if request.param == "mixed":
        generated = np.random.default_rng(0).integers(0, 256, (30, 32, 32, 3), np.uint8)
        np.savez(root / "aux.npz", image=generated, label=np.arange(30) % 10)
        extra = {"use_edm": True, "aux_data_filename": root / "aux.npz"}
    return lambda **flags: build_pretrain_data("cifar10", root, 32, 4, **extra, **flags)


def collect(stream, epoch=0, start_step=0):
    """Images and labels of the rest of an epoch."""
    batches = list(stream.epoch(epoch, start_step))
    return torch.stack([images for images, _ in batches]), torch.stack([labels for _, labels in batches])


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(one, other))


def test_workers_and_resuming_do_not_change_a_bit(build):
    alone, helped = build(), build(num_workers=2)
    whole = [collect(alone, epoch) for epoch in range(2)]
    assert len(whole[0][0]) == len(alone) == 5
    try:
        assert all(same(collect(helped, epoch), whole[epoch]) for epoch in range(2))
        abandoned = helped.epoch(0)
        next(abandoned)
        for start in (4, 1, 0):  # the workers persist; what they had prepared for the abandoned epoch is dropped
            rest = collect(helped, 1, start)
            assert same(rest, [part[start:] for part in whole[1]])
        for stream in (alone, helped):
            abandoned, current = stream.epoch(0), stream.epoch(1)
            assert list(abandoned) == []
            assert len(list(current)) == 5
    finally:
        helped.close()
    for start in range(5):
        assert same(collect(build(), 1, start), [part[start:] for part in whole[1]])
    assert list(alone.epoch(1, 5)) == []


def test_epochs_seeds_and_ranks_differ(build):
    stream = build(world_size=2)
    first = collect(stream)
    for other in (collect(stream, 1), collect(build(world_size=2, seed=1)), collect(build(world_size=2, rank=1))):
        assert not same(first, other)


def test_crops_change_with_every_part_of_the_position(tmp_path):
    write_classes(tmp_path, 4, 48)
    arrays = read_images("digits", "")
    for source, resize in ((arrays, False), (read_images("imagefolder", tmp_path), True)):

        def crops(epoch, step, rank, seed, source=source, resize=resize):
            maker = BatchMaker(source, 24, resize, True, seed, rank)
            return maker[BatchKey(epoch, step, np.arange(8))][0]

        first = crops(0, 0, 0, 0)
        assert torch.equal(first, crops(0, 0, 0, 0))
        assert not any(torch.equal(first, crops(*row)) for row in np.eye(4, dtype=int).tolist())


def test_global_random_state_is_untouched(build):
    states = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    for workers in (0, 2):
        stream = build(num_workers=workers)
        collect(stream, 0, 3)
        stream.close()
    assert torch.equal(torch.get_rng_state(), states[0])
    assert np.random.get_state()[1].tolist() == states[1]
    assert random.getstate() == states[2]
    torch.manual_seed(1)
    np.random.seed(1)
    random.seed(1)
    reseeded = collect(build())
    torch.manual_seed(2)
    np.random.seed(2)
    random.seed(2)
    assert same(reseeded, collect(build()))


@pytest.mark.parametrize(("num_images", "batch_size", "world_size"), [(20, 4, 1), (23, 4, 2), (24, 2, 3), (7, 7, 1)])
def test_ranks_are_disjoint_and_cover(num_images, batch_size, world_size):
    ranks = [ShuffleSchedule(num_images, batch_size, rank, world_size, seed=3) for rank in range(world_size)]
    steps = num_images // (batch_size * world_size)
    orders = []
    for epoch in range(2):
        seen = [list(schedule.batches(epoch)) for schedule in ranks]
        assert all(len(batches) == len(schedule) == steps for batches, schedule in zip(seen, ranks))
        assert all(len(batch) == batch_size for batches in seen for batch in batches)
        orders.append(np.concatenate([batch for batches in seen for batch in batches]))
        assert len(set(orders[-1].tolist())) == steps * batch_size * world_size
        assert set(orders[-1].tolist()) <= set(range(num_images))
    assert not np.array_equal(*orders)
    whole = ShuffleSchedule(num_images, batch_size * world_size, seed=3)  # same images per step on any number of ranks
    for step, batch in enumerate(whole.batches(1)):
        assert set(batch.tolist()) == set(np.concatenate([seen[rank][step] for rank in range(world_size)]).tolist())


def test_labels_belong_to_their_images(tmp_path):
    known = {image.tobytes(): label for image, label in zip(*write_cifar10(tmp_path))}
    found, expected = [], []
    for images, labels in build_pretrain_data("cifar10", tmp_path, 40, 4, seed=5).epoch(0):  # 40: whole padded images
        for inner in images.permute(0, 2, 3, 1).numpy()[:, 4:-4, 4:-4]:
            found.append(known.get(inner.tobytes(), known.get(inner[:, ::-1].tobytes())))
        expected += labels.tolist()
    assert found == expected
    assert len(found) == 20


def test_workers_survive_signals_to_the_job_and_end_with_close(build):
    before = set(multiprocessing.active_children())
    stream = build(num_workers=2)
    batches = stream.epoch(0)
    for _ in range(2):  # one batch of each worker: both have started
        next(batches)
    workers = set(multiprocessing.active_children()) - before
    assert len(workers) == 2
    for name in ("INT", "USR1", "TERM", "TERM"):  # from another process, as a scheduler does to a whole job
        subprocess.run(["kill", f"-{name}", *(str(worker.pid) for worker in workers)], check=True)
    assert len(list(batches)) == 3
    assert len(collect(stream, 1)[0]) == 5
    next(iter(workers)).terminate()  # from the main process: as a last resort for one that hangs
    next(iter(workers)).join(10)
    assert not next(iter(workers)).is_alive()
    stream.close()
    stream.close()
    assert not workers & set(multiprocessing.active_children())
    with pytest.raises(RuntimeError, match="closed"):
        stream.epoch(0)


class ThreadCounts(ArrayImages):
    """Images whose labels tell how many threads torch has where they are taken."""

    def take(self, indices, convert=None):
        taken = super().take(indices, convert)
        return taken._replace(labels=np.full_like(taken.labels, torch.get_num_threads()))


def test_workers_have_one_thread():
    source = ThreadCounts(np.zeros((4, 32, 32, 3), np.uint8), np.zeros(4))
    batches = BatchMaker(source, 32, False, False, 0, 0)
    stream = BatchStream("counts", 4, dataset_info("digits"), ShuffleSchedule(4, 2), batches, num_workers=1)
    assert torch.cat([labels for _, labels in stream.epoch(0)]).tolist() == [1] * 4
    stream.close()


INTERRUPTED = """
import multiprocessing, torch, mimir_fast.data as data
print(torch.cuda.is_initialized(), multiprocessing.active_children())
stream = data.build_pretrain_data("digits", "", 32, 4, num_workers=2)
for batch in stream.epoch(0):
    raise KeyboardInterrupt
"""


def test_an_interrupted_program_ends_without_waiting_for_its_workers():
    command = [sys.executable, "-c", INTERRUPTED]
    result = subprocess.run(command, capture_output=True, text=True, timeout=1800, check=False)
    assert result.returncode != 0
    assert result.stderr.strip().endswith("KeyboardInterrupt")
    assert "worker" not in result.stderr.lower()
    assert result.stdout.strip() == "False []"  # importing starts neither a GPU nor a process


def test_positions_outside_an_epoch_are_refused(build):
    for epoch, start in ((0, 6), (0, -1), (-1, 0)):
        with pytest.raises(DataError, match="start_step"):
            build().epoch(epoch, start)
