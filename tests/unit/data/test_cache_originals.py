"""What caches are made of: class folders as they are or resized for evaluation, tar files, an npz."""

import io
import tarfile
from pathlib import Path

import numpy as np
import pytest

from mimir_fast.data import DataError
from mimir_fast.data.cache.format import Options
from mimir_fast.data.cache.index import read_index
from mimir_fast.data.cache.originals import open_originals
from mimir_fast.data.cache.pixels import to_pixels
from mimir_fast.data.eval_stream import resized
from tests.support.pictures import make_cache, picture, stored, write_pictures

SMALL = Options("train", "yuv420", 24, 0, 8)


def test_rgb_as_it_is(tmp_path):
    pictures = write_pictures(tmp_path / "pictures")
    make_cache(pictures, tmp_path, Options("train", "rgb", 0, 0, 100))
    for image in (0, 3, 20):
        whole = open_originals(pictures, "train").read(image)
        assert stored(tmp_path / "train", image) == np.asarray(whole).tobytes()


def test_val_is_what_evaluation_resizes(tmp_path):
    (tmp_path / "val" / "ant").mkdir(parents=True)
    picture(0, 50, 70).save(tmp_path / "val" / "ant" / "0.png")
    make_cache(tmp_path, tmp_path / "dst", Options("val", "rgb", 0, 28, 100))
    expected = resized(picture(0, 50, 70), 28)
    assert expected.size == (44, 32)
    assert stored(tmp_path / "dst" / "val", 0) == np.asarray(expected).tobytes()


def write_tar(path: Path, first: int, count: int, **without) -> None:
    with tarfile.open(path, "w") as tar:
        for number in range(first, first + count):
            buffer = io.BytesIO()
            picture(number, 20, 30).save(buffer, "PNG")
            files = {"png": buffer.getvalue(), "cls": str(number % 3).encode(), "json": b"{}"}
            for ending, content in files.items():
                if ending not in without:
                    info = tarfile.TarInfo(f"a/{number:03d}.{ending}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))


def test_tar_files(tmp_path):
    write_tar(tmp_path / "b.tar", 5, 4)
    write_tar(tmp_path / "a.tar", 0, 5)
    manifest = make_cache(tmp_path, tmp_path / "dst", SMALL)
    index = read_index(tmp_path / "dst" / "train", manifest)
    assert index.label.tolist() == [number % 3 for number in range(9)]
    assert index.names().relative(6) == "b.tar/a/006.png"
    assert manifest.classes == ["0", "1", "2"]
    for image in (0, 8):
        expected = to_pixels(picture(image, 20, 30), "yuv420").tobytes()
        assert stored(tmp_path / "dst" / "train", image) == expected
    write_tar(tmp_path / "b.tar", 5, 4, cls=None)
    with pytest.raises(DataError, match=r"b.tar: a/005.png has no class number"):
        open_originals(tmp_path, "train")
    (tmp_path / "b.tar").write_bytes(b"x" * 2000)
    with pytest.raises(DataError, match=r"b.tar: not an uncompressed tar"):
        open_originals(tmp_path, "train")


def test_npz(tmp_path):
    images = np.stack([np.asarray(picture(number, 20, 30)) for number in range(5)])
    np.savez(tmp_path / "images.npz", image=images, label=np.array([2, 0, 1, 1, 0]))
    manifest = make_cache(tmp_path / "images.npz", tmp_path / "dst", Options("train", "rgb", 0, 0, 2))
    assert read_index(tmp_path / "dst" / "train", manifest).label.tolist() == [2, 0, 1, 1, 0]
    assert stored(tmp_path / "dst" / "train", 3) == images[3].tobytes()
