"""Images and folders that users have: each kind decided once, for training, for images in memory and for evaluation alike."""

import os
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torchvision.transforms as tv
from PIL import Image

from mimir_fast.data import DataError, build_pretrain_data, build_train_data, eval_batches
from mimir_fast.data.cache.originals import open_originals
from mimir_fast.data.datasets import read_images
from mimir_fast.data.fingerprints import content_fingerprint, names_fingerprint
from mimir_fast.data.folders import class_folders, read_image
from mimir_fast.data.policies import Augment
from mimir_fast.data.sources import FolderImages, decode_all
from tests.unit.data.test_layouts import random_image, write_classes

SIDE = 32
GREY = np.linspace(0, 255, SIDE * SIDE).reshape(SIDE, SIDE).astype(np.uint8)
COLOUR = random_image(3, SIDE)


def as_16_bits(values: np.ndarray) -> bytes:
    """A PNG with 16 bits a channel, which Pillow can read but not write in colour."""
    import struct
    import zlib

    colour_type = 0 if values.ndim == 2 else 2
    rows = (values.astype(">u2") * 257).astype(">u2").reshape(SIDE, -1)
    raw = b"".join(b"\0" + row.tobytes() for row in rows)
    header = struct.pack(">IIBBBBB", SIDE, SIDE, 16, colour_type, 0, 0, 0)
    parts = [(b"IHDR", header), (b"IDAT", zlib.compress(raw)), (b"IEND", b"")]
    chunks = [
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)) for kind, body in parts
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def saved(image: Image.Image, name: str, **options):
    return lambda folder: image.save(folder / name, **options)


def oriented(folder) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(COLOUR).save(folder / "a.png", exif=exif)


def palette(**options):
    image = Image.fromarray(COLOUR).quantize(200)
    return image, np.asarray(image.convert("RGB")), options


RGBA = Image.fromarray(np.dstack([COLOUR, GREY]))
CMYK = Image.fromarray(np.dstack([COLOUR, GREY // 4]), "CMYK")
TRANSPARENT = Image.fromarray(COLOUR).quantize(200)
FRAMES = [Image.fromarray(COLOUR).quantize(255), Image.fromarray(255 - COLOUR).quantize(255)]

KINDS = {
    "16-bit grey": (lambda f: (f / "a.png").write_bytes(as_16_bits(GREY)), GREY),
    "16-bit grey tiff": (saved(Image.fromarray(GREY.astype(np.uint16) * 257), "a.tif"), GREY),
    "16-bit grey ppm": (saved(Image.fromarray(GREY.astype(np.uint16) * 257), "a.pgm"), GREY),
    "16-bit colour": (lambda f: (f / "a.png").write_bytes(as_16_bits(COLOUR)), COLOUR),
    "grey": (saved(Image.fromarray(GREY), "a.png"), GREY),
    "black and white": (saved(Image.fromarray(GREY > 99), "a.png"), np.where(GREY > 99, 255, 0)),
    "palette": (saved(TRANSPARENT, "a.png"), np.asarray(TRANSPARENT.convert("RGB"))),
    "palette with alphas": (
        saved(TRANSPARENT, "a.png", transparency=bytes(range(200))),
        np.asarray(TRANSPARENT.convert("RGB")),
    ),
    "alpha": (saved(RGBA, "a.png"), COLOUR),
    "grey and alpha": (saved(Image.merge("LA", [Image.fromarray(GREY)] * 2), "a.png"), GREY),
    "CMYK": (saved(CMYK, "a.tif"), np.asarray(CMYK.convert("RGB"))),
    "EXIF orientation": (oriented, COLOUR),
    "broken EXIF": (saved(Image.fromarray(COLOUR), "a.png", exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff\1\x12"), COLOUR),
    "PNG named .JPEG": (saved(Image.fromarray(COLOUR), "a.JPEG", format="PNG"), COLOUR),
    "animated": (
        saved(FRAMES[0], "a.webp", save_all=True, append_images=FRAMES[1:], lossless=True),
        np.asarray(FRAMES[0].convert("RGB")),
    ),
}


def expected_rgb(values: np.ndarray) -> np.ndarray:
    values = np.asarray(values, np.uint8)
    return np.repeat(values[..., None], 3, axis=2) if values.ndim == 2 else values


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_for_training_caching_and_evaluation(tmp_path, kind):
    write, values = KINDS[kind]
    folder = tmp_path / "train" / "a"
    folder.mkdir(parents=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        write(folder)
        source = read_images("imagefolder", tmp_path)
        assert isinstance(source, FolderImages)
        source.side = SIDE
        cached = open_originals(tmp_path, "train").read(0)
        found = [source.take(np.array([0])).images[0], decode_all(source).images[0], np.asarray(cached)]
        ((images, _),) = eval_batches("imagefolder", tmp_path, SIDE, 1, split="train", eval_resize="none")
    for image in (*found, images[0].permute(1, 2, 0).numpy()):
        np.testing.assert_array_equal(image, expected_rgb(values))


@pytest.mark.parametrize(
    ("image", "reason"),
    [
        (Image.fromarray(COLOUR[..., 0].astype(np.float32)), "floats, whose range is not known"),
        (Image.fromarray(COLOUR[..., 0].astype(np.int32) * 1000), "32-bit integers, whose range is not known"),
    ],
)
def test_values_of_an_unknown_range_are_unreadable_with_a_reason(tmp_path, image, reason):
    (tmp_path / "train" / "a").mkdir(parents=True)
    image.save(tmp_path / "train" / "a" / "x.tif")
    with pytest.raises(DataError, match=reason):
        list(eval_batches("imagefolder", tmp_path, SIDE, 1, split="train"))


@pytest.mark.filterwarnings("ignore:Image size")
def test_an_image_of_one_pixel_and_a_huge_one(tmp_path, monkeypatch):
    write_classes(tmp_path / "train", 2, 40, classes=("a",))
    Image.new("RGB", (1, 1), (9, 8, 7)).save(tmp_path / "train" / "a" / "one.png")
    ((images, _),) = eval_batches("imagefolder", tmp_path, SIDE, 3, split="train")
    assert images[2, :, 5, 6].tolist() == [9, 8, 7]
    stream = build_pretrain_data("imagefolder", tmp_path, SIDE, 3)
    assert next(iter(stream.epoch(0)))[0].shape == (3, 3, SIDE, SIDE)
    # 40 x 40 pixels stand for a hundred million: more than the limit is read, more than twice the limit is not.
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    list(eval_batches("imagefolder", tmp_path, SIDE, 3, split="train"))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 700)
    with pytest.raises(DataError, match=r"DecompressionBombError.*exceeds limit"):
        list(eval_batches("imagefolder", tmp_path, SIDE, 3, split="train"))


def test_a_large_image_is_no_warning():
    check = "assert ('ignore', None, Image.DecompressionBombWarning, None, 0) in warnings.filters"
    code = f"import warnings; from PIL import Image; import mimir_fast.data.decoding; {check}"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# ---- the centre crop


@pytest.mark.parametrize(("size", "share"), [(96, 0.875), (224, 0.875), (225, 1.0), (384, 1.0)])
def test_the_edges_are_cut_off_up_to_224_pixels_only(tmp_path, size, share):
    """As in the original's evaluation."""
    folder = tmp_path / "val" / "a"
    folder.mkdir(parents=True)
    image = Image.fromarray(random_image(1, 60, 80)).resize((640, 480), Image.Resampling.BICUBIC)
    image.save(folder / "a.png")
    whole = tv.Compose([tv.Resize(int(size / share), tv.InterpolationMode.BICUBIC), tv.CenterCrop(size)])
    ((images, _),) = eval_batches("imagefolder", tmp_path, size, 1)
    np.testing.assert_array_equal(images[0].permute(1, 2, 0).numpy(), np.asarray(whole(image)))


def test_images_of_the_inputs_size_are_taken_as_they_are_on_request(tmp_path):
    write_classes(tmp_path / "val", 2, 40, classes=("a",))
    first = np.asarray(Image.open(sorted((tmp_path / "val" / "a").iterdir())[0]))
    ((images, _),) = eval_batches("imagefolder", tmp_path, 40, 2, eval_resize="none")
    np.testing.assert_array_equal(images[0].permute(1, 2, 0).numpy(), first)
    with pytest.raises(DataError, match="40x40 pixels, expected 48x48"):
        list(eval_batches("imagefolder", tmp_path, 48, 2, eval_resize="none"))
    with pytest.raises(DataError, match=r"^eval_resize: none, but images of digits have 32 x 32 pixels"):
        eval_batches("digits", "", 28, 2, eval_resize="none")
    with pytest.raises(DataError, match=r"^eval_resize: 'all', expected crop or none"):
        eval_batches("digits", "", 32, 2, eval_resize="all")
    assert eval_batches("digits", "", 32, 2, eval_resize="none").num_images == 297


# ---- folders


def count(root) -> int:
    return build_pretrain_data("imagefolder", root, SIDE, 2).num_images


def test_a_link_that_leads_back_is_followed_once(tmp_path):
    write_classes(tmp_path / "train", 4, classes=("a", "b"))
    # One after the other: two links that are followed for ever are too many paths to count.
    for target, place in ((".", "a/self"), ("..", "a/up"), (tmp_path, "all")):
        os.symlink(target, tmp_path / "train" / place)
        assert count(tmp_path) == 8
    assert class_folders(tmp_path / "train") == ["a", "b"]


def test_links_to_other_folders_are_followed_to_each_once(tmp_path):
    write_classes(tmp_path / "elsewhere", 3, classes=("x",))
    write_classes(tmp_path / "train", 2, classes=("a", "b"))
    for name in ("one", "two"):
        os.symlink(tmp_path / "elsewhere" / "x", tmp_path / "train" / "a" / name)
    os.symlink(tmp_path / "elsewhere" / "x", tmp_path / "train" / "c")
    assert count(tmp_path) == 2 + 3 + 2 + 3


@pytest.mark.parametrize("name", [".ipynb_checkpoints", ".git", "__MACOSX", "@eaDir", "lost+found", "$RECYCLE.BIN"])
def test_hidden_and_system_folders_are_ignored_at_every_depth(tmp_path, name, caplog):
    write_classes(tmp_path / "train", 2, classes=("a", "b"))
    for place in (tmp_path / "train", tmp_path / "train" / "a", tmp_path / "train" / "a" / "deeper"):
        (place / name).mkdir(parents=True)
        Image.fromarray(COLOUR).save(place / name / "x.png")
    assert count(tmp_path) == 4
    assert not caplog.records


def test_a_folder_with_val_alone_is_no_class(tmp_path):
    write_classes(tmp_path / "val", 2)
    with pytest.raises(
        DataError, match=r"^data_root: .* holds val and no train; put the training images into train/CLASS/"
    ):
        read_images("imagefolder", tmp_path)
    assert read_images("imagefolder", tmp_path, "val").classes == ["ant", "bee"]


def test_val_beside_class_folders_is_no_class_and_has_their_labels(tmp_path):
    write_classes(tmp_path, 2, classes=("ant", "bee", "cat"))
    write_classes(tmp_path / "val", 1, classes=("bee",))
    assert read_images("imagefolder", tmp_path).classes == ["ant", "bee", "cat"]
    validation = read_images("imagefolder", tmp_path, "val")
    assert (validation.classes, validation.labels.tolist()) == (["ant", "bee", "cat"], [1])


# ---- fingerprints


def test_fingerprints_cover_every_name_label_and_content(tmp_path):
    write_classes(tmp_path / "train", 3, classes=("a", "b"))
    everything = np.arange(6)

    def prints() -> tuple[str, str]:
        source = read_images("imagefolder", tmp_path)
        return names_fingerprint(source), content_fingerprint(source, everything[: len(source)])

    before, files = prints(), sorted((tmp_path / "train" / "b").iterdir())
    os.utime(files[0], (1, 1))
    assert prints() == before, "another time is not another image"
    content = files[1].read_bytes()
    files[1].write_bytes(content[:-1] + b"\0")
    changed = prints()
    assert changed[0] == before[0]
    assert changed[1] != before[1]
    files[1].write_bytes(content)
    files[2].rename(files[2].with_name("zz.png"))
    renamed = prints()
    assert renamed[0] != before[0]
    assert renamed[1] != before[1]
    (tmp_path / "train" / "a").rename(tmp_path / "train" / "c")
    assert prints()[1] not in (before[1], renamed[1])
    for split, other in (("train", "val"), ("val", "train")):
        source = read_images("digits", "", split)
        assert names_fingerprint(source) == names_fingerprint(read_images("digits", "", split))
        assert names_fingerprint(source) != names_fingerprint(read_images("digits", "", other))
        first, later = (content_fingerprint(source, np.array(some)) for some in ([0, 1], [0, 2]))
        assert first != later


def test_augmented_training_reads_them_too(tmp_path):
    (tmp_path / "train" / "a").mkdir(parents=True)
    write_classes(tmp_path / "train", 2, classes=("b",))
    (tmp_path / "train" / "a" / "a.png").write_bytes(as_16_bits(np.full((SIDE, SIDE), 77, np.uint8)))
    stream = build_train_data("imagefolder", tmp_path, SIDE, 3, augment=Augment())
    images, labels = next(iter(stream.epoch(0)))
    assert (images[labels == 0] == 77).all()


ODD = random_image(5, 48)[:47, :45]
JPEGS = {
    "luma and chroma": (Image.fromarray(ODD), {"quality": 95}, "YCbCr"),
    "chroma at full resolution": (Image.fromarray(ODD), {"subsampling": 0}, "YCbCr"),
    "red, green and blue": (Image.fromarray(ODD), {"keep_rgb": True}, "RGB"),
    "grey": (Image.fromarray(ODD[..., 0]), {}, "RGB"),
    "CMYK": (Image.fromarray(np.dstack([ODD, ODD[..., 0]]), "CMYK"), {}, "RGB"),
}


@pytest.mark.parametrize("kind", JPEGS)
def test_luma_and_chroma_come_as_a_jpeg_file_holds_them(tmp_path, kind):
    """For caches; from files that hold other colours, or a PNG, they come in RGB.  Planted: every JPEG file's taken so."""
    image, options, mode = JPEGS[kind]
    image.save(tmp_path / "a.jpg", **options)
    path = str(tmp_path / "a.jpg")
    rgb, other = read_image(path), read_image(path, ycc=True)
    assert (rgb.mode, other.mode, other.size) == ("RGB", mode, rgb.size)
    np.testing.assert_array_equal(rgb, Image.open(path).convert("RGB"))
    # The two conversions round differently.
    assert np.abs(np.asarray(other.convert("RGB"), int) - np.asarray(rgb)).max() <= 2
