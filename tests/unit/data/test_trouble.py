"""Missing, empty and damaged data: one line that names the culprit, and unreadable images replaced, counted, reported."""

import io
import logging
import multiprocessing
import pickle
from urllib.error import URLError

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

from mimir_fast.data import DataError, build_pretrain_data
from mimir_fast.data.datasets import read_images
from tests.unit.data.test_layouts import random_image, write_cifar10, write_classes


def first_epoch(*arguments, **flags):
    stream = build_pretrain_data(*arguments, **flags)
    try:
        return list(stream.epoch(0))
    finally:
        stream.close()


def refused(*patterns, dataset="imagefolder", root=None, input_size=32, batch_size=2, **flags):
    """The message of the DataError, one line that contains all patterns."""
    with pytest.raises(DataError) as caught:
        first_epoch(dataset, root, input_size, batch_size, **flags)
    message = str(caught.value)
    assert "\n" not in message
    assert all(str(pattern) in message for pattern in patterns), message
    return message


def damage(root, names, content=b""):
    """Overwrite images, given as CLASS/FILE, with these bytes."""
    for name in names:
        (root / name).write_bytes(content)


def jpeg(cut: int | None = None) -> bytes:
    """A valid JPEG file of 64x64 noise, cut off after so many bytes."""
    buffer = io.BytesIO()
    Image.fromarray(random_image(5, 64)).save(buffer, "JPEG")
    return buffer.getvalue()[:cut]


def png_with_broken_data() -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(random_image(5, 32)).save(buffer, "PNG")
    content = bytearray(buffer.getvalue())
    content[200:220] = bytes(20)
    return bytes(content)


def test_unknown_dataset_names_the_known_ones():
    refused("dataset", "'mnist'", "imagenet", "digits", dataset="mnist")


@pytest.mark.parametrize("dataset", ["imagenet", "imagefolder", "tiny-imagenet"])
def test_missing_folder(tmp_path, dataset):
    refused(tmp_path / "nowhere", "data_root", dataset=dataset, root=tmp_path / "nowhere")


def test_no_class_folders_and_no_images(tmp_path):
    (tmp_path / "train").mkdir()
    Image.fromarray(random_image(0, 8)).save(tmp_path / "train" / "stray.png")
    for dataset in ("imagenet", "imagefolder", "cifar10", "tiny-imagenet"):
        refused(tmp_path / "train", "no class folders", dataset=dataset, root=tmp_path)


def test_empty_class_folder_is_named(tmp_path):
    write_classes(tmp_path / "train", 2)
    (tmp_path / "train" / "cow" / "deeper").mkdir(parents=True)
    (tmp_path / "train" / "cow" / "readme.txt").write_text("x")
    for dataset in ("imagenet", "imagefolder", "cifar10", "tiny-imagenet"):
        refused(tmp_path / "train" / "cow", "remove it or fill it", dataset=dataset, root=tmp_path)


def test_unknown_class_in_val(tmp_path):
    write_classes(tmp_path / "train", 1)
    write_classes(tmp_path / "val", 1, classes=("ant", "wasp"))
    with pytest.raises(DataError, match="wasp"):
        read_images("imagenet", tmp_path, "val")


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ("", "separated by a tab"),
        ("val_0.png ant\n", "separated by a tab"),
        ("val_0.png\twasp\n", "wasp"),
        (None, "no such file"),
    ],
)
def test_tiny_imagenet_annotations(tmp_path, content, named):
    write_classes(tmp_path / "train", 1, 64)
    (tmp_path / "val" / "images").mkdir(parents=True)
    Image.fromarray(random_image(0, 64)).save(tmp_path / "val" / "images" / "val_0.png")
    if content is not None:
        (tmp_path / "val" / "val_annotations.txt").write_text(content)
    with pytest.raises(DataError, match=r"val_annotations.txt") as caught:
        read_images("tiny-imagenet", tmp_path, "val")
    assert named in str(caught.value)


def test_fewer_images_than_one_step(tmp_path):
    write_classes(tmp_path, 3)
    refused("batch_size: 4 x 2", "only 6", root=tmp_path, batch_size=4, world_size=2)


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ({"input_size": 41}, "input_size: 41"),
        ({"input_size": 0}, "input_size"),
        ({"batch_size": 0}, "batch_size"),
        ({"accum_iter": 0}, "accum_iter"),
        ({"num_workers": -1}, "num_workers"),
        ({"world_size": 0}, "world_size"),
        ({"rank": 2, "world_size": 2}, "rank"),
    ],
)
def test_impossible_flags(flags, named):
    refused(named, dataset="digits", **flags)


@pytest.mark.parametrize(("dataset", "name"), [("cifar10", "CIFAR10"), ("cifar100", "CIFAR100"), ("svhn", "SVHN")])
def test_failed_download_says_what_to_put_where(tmp_path, monkeypatch, dataset, name):
    def offline(*args, **kwargs):
        raise URLError("no route\nto host")

    monkeypatch.setattr(torchvision.datasets, name, offline)
    refused("data_root", tmp_path, "class folders in train/", "no route", dataset=dataset, root=tmp_path)


def test_download_is_used_when_it_works(tmp_path, monkeypatch):
    monkeypatch.setattr(torchvision.datasets, "CIFAR10", lambda root, train, download: write_cifar10(tmp_path))
    assert len(read_images("cifar10", tmp_path)) == 20


def test_damaged_cifar_archives(tmp_path):
    write_cifar10(tmp_path)
    path = tmp_path / "cifar-10-batches-py" / "data_batch_3"
    whole = path.read_bytes()
    contents = [whole[:1000], b"", pickle.dumps({"data": 1}), pickle.dumps([1]), pickle.dumps(print)]
    contents += [pickle.dumps({"data": np.zeros((1, 3072), np.uint8), "labels": [1, 2]}, protocol=2)]
    contents += [pickle.dumps({"data": np.zeros((1, 3072), np.float32), "labels": [1]}, protocol=2)]
    for content in contents:
        path.write_bytes(content)
        refused(path, "remove", dataset="cifar10", root=tmp_path)
    path.unlink()
    refused(path, "no such file", dataset="cifar10", root=tmp_path)


def test_pickles_cannot_run_code(tmp_path):
    write_cifar10(tmp_path)

    class Attack:
        def __reduce__(self):
            return (open, (str(tmp_path / "written"), "w"))

    (tmp_path / "cifar-10-batches-py" / "data_batch_1").write_bytes(pickle.dumps(Attack(), protocol=2))
    refused("not allowed", dataset="cifar10", root=tmp_path)
    assert not (tmp_path / "written").exists()


@pytest.mark.parametrize("content", [b"", b"x" * 500, b"MATLAB 5.0 MAT-file" + bytes(200)])
def test_damaged_svhn(tmp_path, content):
    path = tmp_path / "train_32x32.mat"
    path.write_bytes(content)
    refused(path, "remove", dataset="svhn", root=tmp_path)


@pytest.mark.parametrize(
    ("content", "reason"),
    [(b"", "empty file"), (b"hello world", "not an image"), (jpeg(900), "truncated"), (png_with_broken_data(), "")],
    ids=["empty", "text", "truncated", "broken"],
)
@pytest.mark.parametrize("num_workers", [0, 2])
def test_unreadable_image_is_replaced_and_reported_once(tmp_path, caplog, content, reason, num_workers):
    images, _ = write_classes(tmp_path / "train", 3, 64)
    damage(tmp_path / "train", ["ant/0002.png"], content)
    stream = build_pretrain_data("tiny-imagenet", tmp_path, 72, 6, num_workers=num_workers)  # crops of 72: whole images
    for epoch in range(2):
        ((batch, labels),) = stream.epoch(epoch)
        inner = batch.permute(0, 2, 3, 1).numpy()[:, 4:-4, 4:-4]
        known = {view.tobytes(): n for n, image in enumerate(images) for view in (image, image[:, ::-1])}
        numbers = [known[image.tobytes()] for image in inner]
        assert sorted(numbers) == [0, 1, 3, 3, 4, 5]  # the next one, of another class, stands in with its own label
        assert labels.tolist() == [number // 3 for number in numbers]
    stream.close()
    ((path, why),) = stream.bad_files.items()
    assert path == str(tmp_path / "train" / "ant" / "0002.png")
    assert reason in why
    assert [record.getMessage() for record in caplog.records] == [f"skipping unreadable image {path}: {why}"]


def test_last_image_is_replaced_by_the_first(tmp_path):
    write_classes(tmp_path, 2)
    damage(tmp_path, ["bee/0001.png"])
    stream = build_pretrain_data("imagefolder", tmp_path, 32, 4)
    ((_, labels),) = stream.epoch(0)
    assert sorted(labels.tolist()) == [0, 0, 0, 1]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_more_than_one_percent_is_fatal(tmp_path, num_workers):
    write_classes(tmp_path, 150, 8)  # 300 images: 3 may be bad
    bad = [f"{name}/{n:04d}.png" for name in ("ant", "bee") for n in (3, 77)]
    damage(tmp_path, bad[:3], b"x")
    stream = build_pretrain_data("imagefolder", tmp_path, 8, 10, num_workers=num_workers)
    assert len(list(stream.epoch(0))) == 30
    assert set(stream.bad_files) == {str(tmp_path / name) for name in bad[:3]}
    stream.close()
    damage(tmp_path, bad[3:], b"x")
    flags = {"root": tmp_path, "input_size": 8, "batch_size": 10, "num_workers": num_workers}
    message = refused(tmp_path, "4 of 300", "at most 3", "not an image", "replace or remove", **flags)
    assert any(name in message for name in bad)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_bad_files_add_up_over_batches(tmp_path, num_workers):
    write_classes(tmp_path, 3)
    damage(
        tmp_path, ["ant/0000.png", "bee/0000.png"]
    )  # of six images one may be bad: fatal, but not in the first batch
    before = set(multiprocessing.active_children())
    stream = build_pretrain_data("imagefolder", tmp_path, 32, 1, num_workers=num_workers)
    with pytest.raises(DataError, match="2 of 6") as caught:
        list(stream.epoch(0))
    assert "\n" not in str(caught.value)
    assert len(stream.bad_files) == 2
    stream.close()
    assert set(multiprocessing.active_children()) <= before  # although the error is still at hand


@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize("dataset", ["imagefolder", "tiny-imagenet", "cifar10"])
def test_nothing_but_bad_files(tmp_path, dataset, num_workers):
    write_classes(tmp_path / "train", 1, classes=("ant",))
    damage(tmp_path / "train", ["ant/0000.png"])
    refused("1 of 1", "empty file", dataset=dataset, root=tmp_path, batch_size=1, num_workers=num_workers)


def test_bad_files_found_while_loading_into_memory(tmp_path, caplog):
    images, labels = write_classes(tmp_path / "train", 4)
    damage(tmp_path / "train", ["bee/0000.png"], jpeg())  # readable, but 64x64
    stream = build_pretrain_data("cifar10", tmp_path, 32, 2)
    assert stream.num_images == 7
    assert list(stream.bad_files.values()) == ["64x64 pixels, expected 32x32"]
    assert len(caplog.records) == 1
    source = read_images("cifar10", tmp_path)
    np.testing.assert_array_equal(source.images, np.delete(images, 4, axis=0))
    np.testing.assert_array_equal(source.labels, np.delete(labels, 4))
    damage(tmp_path / "train", ["ant/0000.png"], jpeg())
    refused(tmp_path / "train", "2 of 8", "64x64", dataset="cifar10", root=tmp_path)


def test_a_bad_file_does_not_depend_on_workers_or_resuming(tmp_path):
    write_classes(tmp_path, 8, 40)
    damage(tmp_path, ["ant/0005.png"])
    alone = build_pretrain_data("imagefolder", tmp_path, 24, 4)
    helped = build_pretrain_data("imagefolder", tmp_path, 24, 4, num_workers=2)
    whole = list(alone.epoch(3))
    for start in (0, 2, 3):
        for (ours, _), (theirs, _) in zip(helped.epoch(3, start), whole[start:], strict=True):
            assert torch.equal(ours, theirs)
    helped.close()


def test_log_lines_go_to_the_package_logger(tmp_path, caplog):
    write_classes(tmp_path / "train", 1)
    with caplog.at_level(logging.INFO, "mimir_fast.data"):
        read_images("cifar10", tmp_path)
    assert [record.name for record in caplog.records] == ["mimir_fast.data"]
