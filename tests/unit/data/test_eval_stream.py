"""Evaluation sees every image once, in a fixed order, cut as the original does; held-out images never train."""

import pickle

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms as tv

from mimir_fast.data import Augment, DataError, build_train_data, eval_batches, subset_indices
from mimir_fast.data.datasets import read_images
from tests.unit.data.test_edm import write_generated
from tests.unit.data.test_layouts import random_image, write_cifar10, write_classes


def collect(stream):
    """All images and labels of a stream."""
    batches = list(stream)
    return torch.cat([images for images, _ in batches]), torch.cat([labels for _, labels in batches])


def refused(*patterns, dataset="imagefolder", root=None, input_size=32, batch_size=4, **options):
    """The message of the DataError, one line that contains all patterns."""
    with pytest.raises(DataError) as caught:
        collect(eval_batches(dataset, root, input_size, batch_size, **options))
    message = str(caught.value)
    assert "\n" not in message
    assert all(str(pattern) in message for pattern in patterns), message


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Class folders with 6 training and 8 validation images of 40x40 pixels."""
    root = tmp_path_factory.mktemp("folders")
    write_classes(root / "train", 3, 40)
    write_classes(root / "val", 4, 40, below="deeper")
    return root


def test_every_image_once_in_order_for_any_batch_size_workers_and_repetition():
    source = read_images("digits", "", "val")
    for batch_size, num_workers in ((297, 0), (64, 2), (1000, 1)):
        stream = eval_batches("digits", "", 32, batch_size, num_workers=num_workers)
        for _ in range(2):
            images, labels = collect(stream)
            np.testing.assert_array_equal(images.permute(0, 2, 3, 1).numpy(), source.images)
            assert labels.tolist() == source.labels.tolist()
        assert len(stream) == -(-297 // batch_size)
    assert (images.dtype, labels.dtype, images.is_contiguous()) == (torch.uint8, torch.int64, True)
    assert (stream.num_images, stream.num_classes, stream.classes[3]) == (297, 10, "3")
    assert stream.mean == stream.std == (0.5, 0.5, 0.5)
    assert collect(eval_batches("digits", "", 32, 500, split="train"))[0].shape == (1500, 3, 32, 32)


@pytest.mark.parametrize("world_size", [1, 2, 5])
def test_ranks_share_the_images(world_size):
    positions = [4, 0, 7, 296, 11, 50, 3]
    whole = eval_batches("digits", "", 32, 3, indices=positions)
    images, _ = collect(whole)
    ranks = [
        eval_batches("digits", "", 32, 3, indices=positions, rank=r, world_size=world_size) for r in range(world_size)
    ]
    for rank, stream in enumerate(ranks):
        assert stream.indices.tolist() == positions[rank::world_size]
        assert torch.equal(collect(stream)[0], images[rank::world_size])
        assert stream.num_images == 7
    assert sorted(np.concatenate([stream.indices for stream in ranks]).tolist()) == sorted(positions)


def test_a_rank_without_images_is_empty():
    stream = eval_batches("digits", "", 32, 3, indices=[5], rank=1, world_size=2)
    assert (len(stream), list(stream)) == (0, [])


@pytest.mark.parametrize("shape", [(300, 400), (64, 47), (33, 200), (20, 31)])
@pytest.mark.parametrize("size", [28, 64])
def test_images_of_any_size_are_resized_and_cut_as_in_torchvision(tmp_path, shape, size):
    path = tmp_path / "val" / "ant" / "0.png"
    path.parent.mkdir(parents=True)
    Image.fromarray(random_image(1, *shape)).save(path)
    # 28 and 64 times 256 / 224 are 32 and 73.1
    steps = [tv.Resize(32 if size == 28 else 73, tv.InterpolationMode.BICUBIC), tv.CenterCrop(size), tv.PILToTensor()]
    expected = tv.Compose(steps)(Image.open(path))
    assert torch.equal(collect(eval_batches("imagefolder", tmp_path, size, 4))[0][0], expected)


def test_small_images_stay_as_they_are_or_are_cut_around_the_centre(tmp_path):
    write_classes(tmp_path / "train", 1, 64)
    write_classes(tmp_path / "val", 2, 64)
    for dataset, side in (("tiny-imagenet", 64), ("digits", 32)):
        options = {"num_classes": 2} if side == 64 else {}
        whole = collect(eval_batches(dataset, tmp_path, side, 50, **options))[0]
        smaller = collect(eval_batches(dataset, tmp_path, side - 8, 50, **options))[0]
        larger = collect(eval_batches(dataset, tmp_path, side + 8, 50, **options))[0]
        assert torch.equal(smaller, whole[..., 4:-4, 4:-4])
        assert torch.equal(larger, torch.nn.functional.pad(whole, (4, 4, 4, 4)))


def test_imagenette_lies_in_its_folder(tmp_path):
    names = [f"n{number}" for number in range(10)]
    for split in ("train", "val"):
        write_classes(tmp_path / "imagenette2" / split, 1, 40, names)
    stream = eval_batches("imagenette", tmp_path, 28, 4)
    assert (stream.num_images, stream.classes) == (10, names)
    assert build_train_data("imagenette", tmp_path, 28, 5, augment=Augment()).num_classes == 10


def test_subsets():
    assert subset_indices(10, 3) == [0, 1, 2]
    chosen = subset_indices(1000, 100, seed=1)
    assert chosen == sorted(set(chosen))
    assert len(chosen) == 100
    assert chosen == subset_indices(1000, 100, seed=1) != subset_indices(1000, 100, seed=2)
    assert abs(np.mean(chosen) - 500) < 5 * 1000 / np.sqrt(12 * 100)
    for count in (0, 11):
        with pytest.raises(DataError, match=f"num_images: {count}"):
            subset_indices(10, count)


def test_image_lists(folders, tmp_path):
    (tmp_path / "list.txt").write_text("bee/deeper/0002.png\n\n  ant/deeper/0000.png\r\n./bee/deeper/0000.png")
    stream = eval_batches("imagefolder", folders, 35, 2, image_list=tmp_path / "list.txt")
    images, labels = collect(stream)
    assert labels.tolist() == [1, 0, 1]
    assert stream.classes == ["ant", "bee"]
    whole = collect(eval_batches("imagefolder", folders, 35, 8))[0]
    assert torch.equal(images, whole[[6, 0, 4]])
    (part,) = eval_batches("imagefolder", folders, 35, 2, image_list=tmp_path / "list.txt", indices=[2])
    assert torch.equal(part[0], whole[[4]])


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("ant/deeper/0000.png\nant/deeper/9.png\nbee/x.png", "2 of 3 images are not in"),
        ("ant/deeper/0000.png\nant/deeper/9.png", "first ant/deeper/9.png"),
        ("wasp/0000.png", "wasp/0000.png is in no class folder"),
        ("../val/ant/deeper/0000.png", "below the folder"),
        ("/val/ant/deeper/0000.png", "below the folder"),
        (".", "below the folder"),
        ("ant/deeper/0000.png\nant/./deeper/0000.png", "twice"),
        ("\n\n", "names no images"),
        (None, "cannot be read"),
    ],
)
def test_image_lists_that_do_not_fit(folders, tmp_path, text, named):
    if text is not None:
        (tmp_path / "list.txt").write_text(text)
    refused("image_list: ", "list.txt", named, root=folders, image_list=tmp_path / "list.txt")


@pytest.mark.parametrize("num_workers", [0, 1])
def test_an_unreadable_image_is_an_error(tmp_path, num_workers):
    write_classes(tmp_path / "train", 1, 64)
    write_classes(tmp_path / "val", 300, 8, classes=("ant",))
    (tmp_path / "val" / "ant" / "0123.png").write_bytes(b"")
    path = tmp_path / "val" / "ant" / "0123.png"
    refused(path, "empty file", root=tmp_path, num_workers=num_workers, indices=[1, 123])
    assert collect(eval_batches("imagefolder", tmp_path, 8, 4, indices=[1, 124]))[1].tolist() == [0, 0]


def test_an_unreadable_image_that_is_decoded_at_the_start_is_an_error(tmp_path):
    for split in ("train", "val"):
        write_classes(tmp_path / split, 3)
    (tmp_path / "val" / "ant" / "0001.png").write_bytes(b"x")
    refused(tmp_path / "val" / "ant" / "0001.png", dataset="cifar10", root=tmp_path, num_classes=2)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"split": "test"}, "split: 'test'"),
        ({"batch_size": 0}, "batch_size"),
        ({"input_size": 41}, "input_size: 41"),
        ({"rank": 1}, "rank"),
        ({"indices": [297]}, "indices"),
        ({"indices": [-1]}, "indices"),
        ({"indices": []}, "indices"),
        ({"indices": [1, 1]}, "twice"),
        ({"split": "held_out"}, "held_out"),
        ({"split": "held_out", "held_out": 1500}, "held_out: 1500 of 1500"),
        ({"image_list": "x"}, "image_list: only for"),
        ({"num_classes": 9}, "nb_classes: 9"),
    ],
)
def test_impossible_options(options, named):
    refused(named, dataset="digits", root="", **options)


def inner_images(stream, epochs=1):
    """The images of 32x32 pixels inside a stream's crops of 40x40, which hold them whole, maybe mirrored."""
    batches = [images for epoch in range(epochs) for images, _ in stream.epoch(epoch)]
    return {image.tobytes() for image in torch.cat(batches)[..., 4:-4, 4:-4].permute(0, 2, 3, 1).numpy()}


def test_held_out_images_never_train_and_are_the_same_for_all_seeds():
    held = eval_batches("digits", "", 32, 300, split="held_out", held_out=200)
    images, labels = collect(held)
    source = read_images("digits", "")
    everything = {image.tobytes() for image in source.images}
    out = {image.tobytes() for image in images.permute(0, 2, 3, 1).numpy()}
    assert len(out) == 200
    streams = [build_train_data("digits", "", 40, 65, augment=Augment(), held_out=200, seed=seed) for seed in (0, 1)]
    for stream in streams:
        assert (stream.num_images, len(stream)) == (1300, 20)
        assert inner_images(stream) == everything - out
    assert len(set(labels.tolist())) == 10
    numbers = {image.tobytes(): number for number, image in enumerate(source.images)}
    spread = np.mean([numbers[image] for image in out])
    assert abs(spread - 750) < 5 * 1500 / np.sqrt(12 * 200)  # from everywhere, not the last ones


def test_held_out_images_never_train_among_generated_ones(tmp_path):
    write_cifar10(tmp_path)
    write_generated(tmp_path / "aux.npz", 6, label=np.arange(6))
    flags = {"use_edm": True, "aux_data_filename": tmp_path / "aux.npz"}
    stream = build_train_data("cifar10", tmp_path, 40, 4, augment=Augment(), held_out=7, **flags)
    assert stream.num_images == 13
    held = eval_batches("cifar10", tmp_path, 32, 8, split="held_out", held_out=7, use_edm=True)
    out = {image.tobytes() for image in collect(held)[0].permute(0, 2, 3, 1).numpy()}
    out |= {image[:, ::-1].tobytes() for image in collect(held)[0].permute(0, 2, 3, 1).numpy()}
    assert not out & inner_images(stream, 6)
    real = {image.tobytes() for image in read_images("cifar10", tmp_path).images}
    assert real & inner_images(stream, 6)


def test_an_unreadable_image_is_not_replaced_by_a_held_out_one(tmp_path):
    images, _ = write_classes(tmp_path / "train", 5, 64)
    for held_out in (4, 8):
        options = {"split": "held_out", "held_out": held_out, "num_classes": 2}
        out = eval_batches("tiny-imagenet", tmp_path, 64, 10, **options)
        out = {image.tobytes() for image in collect(out)[0].permute(0, 2, 3, 1).numpy()}
        kept = [number for number in range(10) if images[number].tobytes() not in out]
        for number in kept:
            path = tmp_path / "train" / ("ant" if number < 5 else "bee") / f"{number % 5:04d}.png"
            whole = path.read_bytes()
            path.write_bytes(b"")
            size = 10 - held_out
            flags = {"augment": Augment(), "num_classes": 2, "held_out": held_out}
            stream = build_train_data("tiny-imagenet", tmp_path, 72, size, **flags)
            ((batch, _),) = stream.epoch(0)
            views = batch[..., 4:-4, 4:-4].permute(0, 2, 3, 1).numpy()
            assert not {view.tobytes() for image in views for view in (image, image[:, ::-1])} & out
            assert stream.bad_files
            path.write_bytes(whole)


def train(dataset, root, **options):
    return build_train_data(dataset, root, 32, 2, augment=Augment(), **options)


def test_numbers_of_classes(folders, tmp_path):
    assert train("imagefolder", folders).classes == ["ant", "bee"]
    assert train("imagefolder", folders, num_classes=2).num_classes == 2
    for options, named in (
        ({"dataset": "imagefolder", "num_classes": 3}, "nb_classes: 3, but found 2"),
        ({"dataset": "imagenet"}, "nb_classes: imagenet has 1000 classes, but found 2"),
    ):
        with pytest.raises(DataError, match=named) as caught:
            train(root=folders, **options)
        assert str(folders / "train") in str(caught.value)
    assert train("imagenet", folders, num_classes=2).num_classes == 2
    write_cifar10(tmp_path)
    assert train("cifar10", tmp_path).classes == [str(number) for number in range(10)]
    names = ["plane", *"bcdefghij"]
    (tmp_path / "cifar-10-batches-py" / "batches.meta").write_bytes(pickle.dumps({"label_names": names}, protocol=2))
    assert train("cifar10", tmp_path).classes == eval_batches("cifar10", tmp_path, 32, 4).classes == names
    with pytest.raises(DataError, match="nb_classes: 100, but found 10 "):
        train("cifar10", tmp_path, num_classes=100)


def test_labels_out_of_range(tmp_path):
    write_cifar10(tmp_path)
    write_generated(tmp_path / "aux.npz", 3)  # labels 50, 51, 52
    with pytest.raises(DataError, match=r"nb_classes: 10 classes, .*aux.npz are 50 to 52"):
        train("cifar10", tmp_path, use_edm=True, aux_data_filename=tmp_path / "aux.npz")
    write_generated(tmp_path / "train.npz", 3, 64, label=np.array([0, -1, 5]))
    write_generated(tmp_path / "aux.npz", 3, 64, label=np.array([0, 1, 5]))
    with pytest.raises(DataError, match=r"nb_classes: .*-1 to 5"):
        build_train_data(
            "tiny-imagenet", tmp_path, 64, 2, augment=Augment(), use_edm=True, aux_data_filename=tmp_path / "aux.npz"
        )
