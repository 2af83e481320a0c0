"""Mixing real and generated images: recorded counts of the original, and where the indices come from."""

import json
import math
from pathlib import Path

import numpy as np
import pytest

from mimir_fast.data import DataError, build_pretrain_data
from mimir_fast.data.batch_order import EdmSampler
from tests.unit.data.test_layouts import random_image, write_cifar10, write_classes

ROWS = json.loads((Path(__file__).parents[2] / "golden" / "edm_sampler.json").read_text())["scalars"]["rows"]


def sampler(row, **position):
    return EdmSampler(
        row["n_sup"], row["n_unsup"], row["batch_size"], row["unsup_fraction"], row["num_batches"], **position
    )


@pytest.mark.parametrize("row", [row for row in ROWS if "per_batch_sup_unsup" in row])
def test_recorded_counts(row):
    ours = sampler(row)
    counts = [[int((b < row["n_sup"]).sum()), int((b >= row["n_sup"]).sum())] for b in ours.batches(0)]
    assert counts == row["per_batch_sup_unsup"]
    assert len(ours) == row["num_batches"]
    assert ours.sup_batch_size == row["sup_batch_size"]


@pytest.mark.parametrize("row", [row for row in ROWS if row.get("merged_pool")])
def test_recorded_merged_pool(row):
    batches = list(sampler(row).batches(0))
    assert [len(batch) for batch in batches] == row["batch_sizes"]
    pool = row["n_sup"] + row["n_unsup"]
    assert sorted(np.concatenate(batches[:2]).tolist()) == list(range(pool))  # each once, then the next permutation


@pytest.mark.parametrize("fraction", [1.0, 1.5, float("nan")])
def test_no_room_for_real_images(fraction):
    with pytest.raises(DataError, match="unsup_fraction"):
        EdmSampler(10, 10, 10, fraction, 3)


@pytest.mark.parametrize("row", [row for row in ROWS if "num_batches" in row])
def test_indices_resume_and_repeat(row):
    size = row["n_sup"] + row["n_unsup"]
    whole = list(sampler(row, rank=1).batches(2))
    assert all(batch.min() >= 0 and batch.max() < size for batch in whole)
    for start in range(row["num_batches"] + 1):
        rest = list(sampler(row, rank=1).batches(2, start))
        assert [b.tolist() for b in rest] == [b.tolist() for b in whole[start:]]
    for position in ({"rank": 0}, {"rank": 1, "seed": 1}):
        assert [b.tolist() for b in sampler(row, **position).batches(2)] != [b.tolist() for b in whole]


def test_resuming_after_several_permutations():
    ours = EdmSampler(5, 9, 4, 0.5, 12)  # three batches per permutation
    whole = [batch.tolist() for batch in ours.batches(0)]
    assert all([b.tolist() for b in ours.batches(0, start)] == whole[start:] for start in range(13))


def test_real_images_differ_between_ranks_epochs_and_seeds():
    def real(epoch, **position):
        batch = next(EdmSampler(100, 9, 20, 0.5, 1, **position).batches(epoch))
        return frozenset(batch[batch < 100].tolist())

    assert len({real(0), real(1), real(0, rank=1), real(0, seed=1)}) == 4


def test_merged_batches_cross_permutations_and_resume():
    ours = EdmSampler(5, 2, 3, -1, 12)
    whole = [batch.tolist() for batch in ours.batches(0)]
    assert all(len(batch) == 3 for batch in whole)
    permutations = np.concatenate(whole[:7]).reshape(3, 7)  # batches are shuffled, so only their union is known
    assert np.bincount(permutations.ravel()).tolist() == [3] * 7
    assert all([b.tolist() for b in ours.batches(0, start)] == whole[start:] for start in range(13))


def test_real_images_come_once_per_permutation_and_generated_ones_with_replacement():
    n_sup, n_unsup = 101, 50
    batches = list(EdmSampler(n_sup, n_unsup, 20, 0.5, 33).batches(0))
    real = [batch[batch < n_sup] for batch in batches]
    assert [len(chunk) for chunk in real[:11]] == [10] * 10 + [1]
    for round_ in range(3):
        assert sorted(np.concatenate(real[11 * round_ : 11 * (round_ + 1)]).tolist()) == list(range(n_sup))
    assert np.concatenate(real[:11]).tolist() != np.concatenate(real[11:22]).tolist()
    generated = np.concatenate([batch[batch >= n_sup] for batch in batches]) - n_sup
    counts = np.bincount(generated, minlength=n_unsup)
    mean = len(generated) / n_unsup
    assert abs(counts.var() / mean - 1) < 5 * math.sqrt(2 / n_unsup)  # a multinomial's spread, not a permutation's
    assert any(len(set(batch.tolist())) < len(batch) for batch in batches)
    first_is_real = np.mean([batch[0] < n_sup for batch in batches])
    assert 0 < first_is_real < 1  # shuffled: generated images do not keep to one end


@pytest.mark.parametrize(("accum_iter", "world_size", "expected"), [(1, 1, 5), (2, 1, 3), (2, 2, 2), (1, 2, 3)])
def test_epoch_length_shrinks_as_in_the_original(tmp_path, accum_iter, world_size, expected):
    write_cifar10(tmp_path)
    write_generated(tmp_path / "aux.npz", 7)
    stream = build_edm(tmp_path, accum_iter=accum_iter, world_size=world_size)
    assert len(stream) == expected == len(list(stream.epoch(0)))
    assert (stream.name, stream.num_images) == ("cifar10s", 20)


def write_generated(path: Path, count: int, side: int = 32, **replaced):
    """An .npz of generated images; labels 50, 51, ... tell them from real ones."""
    images = np.stack([random_image(500 + n, side) for n in range(count)])
    arrays = {"image": images, "label": np.arange(50, 50 + count)} | replaced
    np.savez(path, **{name: array for name, array in arrays.items() if array is not None})


def build_edm(root: Path, **flags):
    return build_pretrain_data("cifar10", root, 40, 4, use_edm=True, aux_data_filename=str(root / "aux.npz"), **flags)


def test_images_and_labels_of_a_mixed_batch(tmp_path):
    real, labels = write_cifar10(tmp_path)
    write_generated(tmp_path / "aux.npz", 7)
    known = {image.tobytes(): label for image, label in zip(real, labels)}
    known |= {random_image(500 + n, 32).tobytes(): 50 + n for n in range(7)}
    for images, targets in build_edm(tmp_path).epoch(0):
        inner = images.permute(0, 2, 3, 1).numpy()[:, 4:-4, 4:-4]  # crops of 40 are whole padded images
        found = [known.get(i.tobytes(), known.get(i[:, ::-1].tobytes())) for i in inner]
        assert found == targets.tolist()
        assert sum(label >= 50 for label in found) == 2  # int(4 * 0.7)


def test_tiny_imagenet_is_decoded_or_read_from_train_npz(tmp_path):
    write_classes(tmp_path / "tiny-imagenet-200" / "train", 4, 64, below="images")
    write_generated(tmp_path / "aux.npz", 3, 64)
    flags = {"use_edm": True, "aux_data_filename": tmp_path / "aux.npz"}
    stream = build_pretrain_data("tiny-imagenet", tmp_path, 64, 4, **flags)
    assert (stream.name, stream.num_images, next(stream.epoch(0))[0].shape) == ("tiny-imagenets", 8, (4, 3, 64, 64))
    write_generated(tmp_path / "tiny-imagenet-200" / "train.npz", 5, 64)
    assert build_pretrain_data("tiny-imagenet", tmp_path, 64, 4, **flags).num_images == 5


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"label": None}, "label"),
        ({"image": np.zeros((3, 32, 32, 3), np.float32)}, "float32"),
        ({"image": np.zeros((3, 3, 32, 32), np.uint8)}, "3, 32, 32"),
        ({"image": np.zeros((3, 16, 16, 3), np.uint8)}, "16, 16"),
        ({"label": np.arange(4)}, "3 integer labels"),
        ({"label": np.zeros(3)}, "integer labels"),
        ({"image": np.array([None] * 3)}, "cannot be read"),
    ],
)
def test_odd_arrays_are_refused(tmp_path, change, named):
    write_cifar10(tmp_path)
    write_generated(tmp_path / "aux.npz", 3, **change)
    with pytest.raises(DataError, match=r"aux_data_filename: .*aux\.npz") as caught:
        build_edm(tmp_path)
    assert named in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [None, b"", b"not a zip", b"PK\x03\x04" + b"x" * 50, "npy", "cut", "folder"])
def test_unreadable_files_are_refused(tmp_path, content):
    write_cifar10(tmp_path)
    path = tmp_path / "aux.npz"
    if content == "folder":
        path.mkdir()
    elif content == "npy":
        with path.open("wb") as file:
            np.save(file, np.zeros(3))
    elif content == "cut":
        write_generated(path, 3)
        path.write_bytes(path.read_bytes()[:5000])
    elif content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match=r"aux_data_filename: .*aux\.npz") as caught:
        build_edm(tmp_path)
    assert "\n" not in str(caught.value)


def test_flags_are_checked_before_anything_is_read(tmp_path):
    with pytest.raises(DataError, match="unsup_fraction"):
        build_edm(tmp_path, unsup_fraction=1.0)
    with pytest.raises(DataError, match="aux_data_filename"):
        build_pretrain_data("cifar10", tmp_path, 32, 4, use_edm=True)
    with pytest.raises(DataError, match=r"use_edm.*cifar10, cifar100, svhn, tiny-imagenet"):
        build_pretrain_data("imagenet", tmp_path, 32, 4, use_edm=True, aux_data_filename="x")


def test_generated_images_without_a_file_say_what_is_wanted_and_where_it_is(tmp_path):
    with pytest.raises(DataError, match="aux_data_filename: got none") as error:
        build_pretrain_data("cifar10", tmp_path, 32, 4, use_edm=True)
    for word in ("--use_edm", "image [N,H,W,3]", "5m.npz", "https://"):
        assert word in str(error.value)
    assert "\n" not in str(error.value)
