"""Damaged caches: a flipped bit, a short or missing file, and manifests of another kind are one line that names the file."""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from mimir_fast.cli.cache import main
from mimir_fast.data import DataError
from mimir_fast.data.cache.format import Options, read_manifest, shard_name, write_manifest
from mimir_fast.data.cache.index import read_index
from tests.support.pictures import make_cache, write_pictures


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    dst = tmp_path_factory.mktemp("cache")
    make_cache(write_pictures(dst / "pictures"), dst, Options("train", "yuv420", 24, 0, 8))
    return dst / "train"


@pytest.fixture
def cache(whole, tmp_path):
    """A copy, to be damaged."""
    shutil.copytree(whole, tmp_path / "train")
    return tmp_path / "train"


def flip(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("damaged", ["shard-00001.bin", "index-label.npy", "manifest.json"])
def test_a_flipped_bit_is_found(cache, tmp_path, capsys, damaged):
    index = read_index(cache, read_manifest(cache))
    flip(
        cache / damaged,
        int(index.offset[10]) + 5 if "shard" in damaged else 700 if "man" in damaged else -1,
    )
    assert main([str(tmp_path), "--verify"]) == 1
    error = capsys.readouterr().err
    assert damaged in error
    assert "damaged" in error
    assert "image 10 (ant/010.jpg)" in error or "shard" not in damaged
    assert error.count("\n") == 1


def test_a_short_or_missing_shard_is_found(cache, tmp_path, capsys):
    path = cache / shard_name(2)
    os.truncate(path, path.stat().st_size - 1)
    assert main([str(tmp_path), "--verify"]) == 1
    assert f"{path}: " in capsys.readouterr().err
    path.unlink()
    assert main([str(tmp_path), "--verify"]) == 1
    assert f"{path}: cannot be read" in capsys.readouterr().err


def test_a_newer_format_is_refused(cache):
    path = cache / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"version": 2, "news": []}))
    with pytest.raises(DataError, match=r"manifest.json: a cache of format 2.*update"):
        read_manifest(cache)


def test_a_manifest_that_names_other_files_is_refused(cache):
    """Even with a checksum that fits: copying a cache removes what its manifest names."""
    manifest = read_manifest(cache)
    write_manifest(cache, replace(manifest, files=manifest.files | {"../../precious": [1, 2]}))
    with pytest.raises(DataError, match="names files that are none of a cache"):
        read_manifest(cache)
