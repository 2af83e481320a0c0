"""Every layout of every data set reads back the images and labels that were written; builders for the other data tests."""

import pickle
from pathlib import Path

import numpy as np
import pytest
import scipy.io
from PIL import Image

from mimir_fast.data import DATASETS, DataError, build_pretrain_data
from mimir_fast.data.datasets import dataset_info, read_images

CLASSES = ("ant", "bee")


def random_image(number: int, height: int, width: int | None = None) -> np.ndarray:
    """uint8 [H,W,3], a function of its number."""
    return np.random.default_rng(number).integers(0, 256, (height, width or height, 3), np.uint8)


def write_classes(root: Path, per_class: int, side: int = 32, classes=CLASSES, below: str = "", ending: str = "png"):
    """root/CLASS[/below]/N.png, images numbered over all classes; returns images [N,H,W,3] and labels."""
    images, labels = [], []
    for label, name in enumerate(classes):
        (root / name / below).mkdir(parents=True, exist_ok=True)
        for number in range(per_class):
            images.append(random_image(len(images), side))
            labels.append(label)
            Image.fromarray(images[-1]).save(root / name / below / f"{number:04d}.{ending}")
    return np.stack(images), np.array(labels)


def write_cifar_batch(path: Path, start: int, count: int, key: str):
    """One pickled batch as in the python version of CIFAR; returns images [N,32,32,3] and labels."""
    images = np.stack([random_image(start + number, 32) for number in range(count)])
    labels = [number % 10 for number in range(start, start + count)]
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = images.transpose(0, 3, 1, 2).reshape(count, -1)
    path.write_bytes(pickle.dumps({"data": rows, key: labels, "batch_label": "x"}, protocol=2))
    return images, np.array(labels)


def write_cifar10(root: Path, per_file: int = 4):
    """cifar-10-batches-py with five small batches; returns the training images and labels."""
    folder = root / "cifar-10-batches-py"
    write_cifar_batch(folder / "test_batch", 1000, 3, "labels")
    parts = [write_cifar_batch(folder / f"data_batch_{n + 1}", n * per_file, per_file, "labels") for n in range(5)]
    return tuple(np.concatenate(arrays) for arrays in zip(*parts))


def assert_same(source, images, labels):
    """The source holds exactly these images and labels, in this order."""
    taken = source.take(np.arange(len(source)))
    np.testing.assert_array_equal(taken.images, images)
    np.testing.assert_array_equal(taken.labels, labels)
    assert taken.labels.dtype == np.int64
    assert not taken.bad


def test_cifar10_archive(tmp_path):
    expected = write_cifar10(tmp_path)
    assert_same(read_images("cifar10", tmp_path), *expected)
    held_out = read_images("cifar10", tmp_path, "val")
    np.testing.assert_array_equal(held_out.take(np.array([2])).images[0], random_image(1002, 32))


def test_cifar100_archive(tmp_path):
    expected = write_cifar_batch(tmp_path / "cifar-100-python" / "train", 0, 6, "fine_labels")
    write_cifar_batch(tmp_path / "cifar-100-python" / "test", 100, 2, "fine_labels")
    assert_same(read_images("cifar100", tmp_path), *expected)
    assert len(read_images("cifar100", tmp_path, "val")) == 2


def test_pickle_of_the_python_2_archives_is_understood(tmp_path):
    path = tmp_path / "cifar-100-python" / "train"
    path.parent.mkdir()
    rows = np.arange(3072, dtype=np.int64).astype(np.uint8)[None]
    # As numpy wrote it under python 2: text instead of bytes for the keys and the array's memory.
    dump = pickle.dumps({"data": rows, "fine_labels": [7]}, protocol=2)
    path.write_bytes(dump.replace(b"cnumpy._core.multiarray", b"cnumpy.core.multiarray"))
    assert_same(read_images("cifar100", tmp_path), rows.reshape(1, 3, 32, 32).transpose(0, 2, 3, 1), [7])


@pytest.mark.parametrize("folder", ["", "cifar10"])
@pytest.mark.parametrize("split", ["train", "val"])
def test_cifar10_class_folders(tmp_path, folder, split):
    write_classes(tmp_path / folder / "train", 1)
    expected = write_classes(tmp_path / folder / split, 3)
    assert_same(read_images("cifar10", tmp_path, split), *expected)


def test_svhn_mat(tmp_path):
    images = np.stack([random_image(n, 32) for n in range(4)])
    content = {"X": images.transpose(1, 2, 3, 0), "y": np.array([[10], [1], [9], [10]], np.uint8)}
    scipy.io.savemat(tmp_path / "train_32x32.mat", content, do_compression=True)
    assert_same(read_images("svhn", tmp_path), images, [0, 1, 9, 0])


@pytest.mark.parametrize("inside", ["", "tiny-imagenet-200"])
@pytest.mark.parametrize("below", ["", "images"])
def test_tiny_imagenet_train(tmp_path, inside, below, caplog):
    expected = write_classes(tmp_path / inside / "train", 2, 64, below=below)
    (tmp_path / inside / "train" / "ant" / "ant_boxes.txt").write_text("0 0 1 1")
    assert_same(read_images("tiny-imagenet", tmp_path), *expected)
    assert_same(read_images("tiny-imagenet", tmp_path, in_memory=True), *expected)
    assert not caplog.records  # the box files belong there


def test_tiny_imagenet_npz_stands_for_the_folder_in_memory(tmp_path):
    write_classes(tmp_path / "train", 1, 64)
    images = np.stack([random_image(90 + n, 64) for n in range(3)])
    np.savez(tmp_path / "train.npz", image=images, label=np.array([1, 0, 1], np.uint8))
    assert_same(read_images("tiny-imagenet", tmp_path, in_memory=True), images, [1, 0, 1])
    assert len(read_images("tiny-imagenet", tmp_path)) == 2
    np.savez(tmp_path / "val.npz", image=images[:2], label=np.array([0, 1], np.uint8))
    assert_same(read_images("tiny-imagenet", tmp_path, "val"), images[:2], [0, 1])  # there is no folder


def test_tiny_imagenet_val_as_downloaded(tmp_path):
    write_classes(tmp_path / "train", 1, 64, classes=("n1", "n2", "n3"))
    (tmp_path / "val" / "images").mkdir(parents=True)
    lines = []
    for number, name in enumerate(("n3", "n1", "n3")):
        Image.fromarray(random_image(number, 64)).save(tmp_path / "val" / "images" / f"val_{number}.PNG")
        lines.append(f"val_{number}.PNG\t{name}\t0\t0\t1\t1\n")
    (tmp_path / "val" / "val_annotations.txt").write_text("".join(lines))
    expected = np.stack([random_image(n, 64) for n in range(3)])
    assert_same(read_images("tiny-imagenet", tmp_path, "val"), expected, [2, 0, 2])


@pytest.mark.parametrize("below", ["", "images"])
def test_tiny_imagenet_val_rearranged_has_the_labels_of_train(tmp_path, below):
    write_classes(tmp_path / "train", 1, 64, classes=("a", "ant", "bee"))
    images, labels = write_classes(tmp_path / "val", 2, 64, below=below)
    (tmp_path / "val" / "images").mkdir()  # what scripts that rearrange leave behind
    assert_same(read_images("tiny-imagenet", tmp_path, "val"), images, labels + 1)


def test_digits_are_split_and_enlarged():
    train, held_out = read_images("digits", "unused"), read_images("digits", "unused", "val")
    assert (len(train), len(held_out)) == (1500, 297)
    assert train.images.shape == (1500, 32, 32, 3)
    assert train.images.dtype == np.uint8
    assert train.images.max() == 255
    assert set(train.labels) == set(held_out.labels) == set(range(10))


@pytest.mark.parametrize(("dataset", "inside"), [("imagenet", "train"), ("imagefolder", "train"), ("imagefolder", "")])
def test_class_folders_of_any_size(tmp_path, dataset, inside):
    write_classes(tmp_path / inside, 2, 40, below="deeper/still", ending="JPEG")
    write_classes(tmp_path / inside, 1, 50, classes=("cow",), ending="webp")
    source = read_images(dataset, tmp_path)
    assert source.labels.tolist() == [0, 0, 1, 1, 2]
    assert [Path(source.files.paths[n]).suffix for n in range(5)] == [".JPEG"] * 4 + [".webp"]
    assert all(Path(source.files.paths[n]).is_file() for n in range(5))


def test_other_files_are_ignored_and_reported_once(tmp_path, caplog):
    write_classes(tmp_path, 2)
    (tmp_path / "ant" / "notes.txt").write_text("x")
    (tmp_path / "bee" / "._0001.png").write_text("x")
    (tmp_path / ".cache").mkdir()
    assert len(read_images("imagefolder", tmp_path)) == 4
    (record,) = caplog.records
    assert record.name == "mimir_fast.data"
    assert "ignored 1 files" in record.getMessage()
    assert "notes.txt" in record.getMessage()


def test_archive_comes_before_folders_and_download(tmp_path):
    expected = write_cifar10(tmp_path)
    write_classes(tmp_path / "train", 1)
    assert_same(read_images("cifar10", tmp_path), *expected)


def test_names_constants_and_an_epoch_of_each(tmp_path):
    assert " ".join(DATASETS) == "imagenet imagenette imagefolder cifar10 cifar100 svhn tiny-imagenet digits"
    write_classes(tmp_path / "train", 4, 64)
    means = {"imagenet": 0.485, "imagefolder": 0.485, "tiny-imagenet": 0.485, "digits": 0.5}
    for dataset, mean in means.items():
        stream = build_pretrain_data(dataset, tmp_path, 24, 3)
        images, labels = next(stream.epoch(0))
        assert images.shape == (3, 3, 24, 24)
        assert images.is_contiguous()
        assert (str(images.dtype), str(labels.dtype), labels.shape) == ("torch.uint8", "torch.int64", (3,))
        assert stream.name == dataset
        assert stream.mean[0] == mean
        assert (stream.num_images, len(stream)) == ((1500, 500) if dataset == "digits" else (8, 2))
    with pytest.raises(DataError, match="split"):
        read_images("digits", tmp_path, "test")


def test_channel_constants_of_the_paper():
    assert dataset_info("cifar10").mean == (0.4914, 0.4822, 0.4465)
    assert dataset_info("cifar10").std == (0.2471, 0.2435, 0.2616)
    for dataset in ("imagenet", "imagefolder", "tiny-imagenet"):
        assert dataset_info(dataset).mean == (0.485, 0.456, 0.406)
        assert dataset_info(dataset).std == (0.229, 0.224, 0.225)
    assert dataset_info("digits").mean == dataset_info("digits").std == (0.5, 0.5, 0.5)
