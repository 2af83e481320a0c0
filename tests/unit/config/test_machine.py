"""A machine that lacks something: a home folder, a temporary folder, characters, processors."""

import contextlib
import io
import os
import sys
from pathlib import Path

import pytest
import torch

from mimir_fast.config import machine
from mimir_fast.config.pretraining import PretrainConfig
from mimir_fast.config.resolve import Machine, resolve


@pytest.fixture
def without_folders(monkeypatch):
    for name in machine.FOLDERS:
        monkeypatch.delenv(name, raising=False)
    yield monkeypatch
    for name in machine.FOLDERS:
        os.environ.pop(name, None)


def test_compiled_code_is_kept_in_the_home_folder(without_folders, tmp_path):
    without_folders.setenv("HOME", str(tmp_path))
    machine.keep_compiled_code()
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(tmp_path / ".cache" / "mimir_fast" / "inductor")
    assert machine.kept_elsewhere() == ""
    assert "TRITON_CACHE_DIR" not in os.environ


def test_a_users_cache_folder_stays(without_folders):
    without_folders.setenv("TORCHINDUCTOR_CACHE_DIR", "/mine")
    machine.keep_compiled_code()
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == "/mine"


@pytest.mark.parametrize("home", ["a file", "none", "another user's cache"])
def test_without_a_home_folder_the_temporary_one_serves_and_it_is_said(without_folders, tmp_path, home):
    """Planted: Path.home() at import, mkdir without a way out, a folder taken because it is there."""
    (tmp_path / "a file").write_text("")
    without_folders.setenv("HOME", str(tmp_path / home))
    if home == "another user's cache":
        # Nothing is refused to whoever may be root here.
        allowed = os.access
        without_folders.setattr(os, "access", lambda path, mode: ".cache" not in str(path) and allowed(path, mode))
    if home == "none":
        without_folders.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("no home")))
    without_folders.setattr(machine.tempfile, "gettempdir", lambda: str(tmp_path))
    machine.keep_compiled_code()
    root = tmp_path / f"mimir_fast-{os.getuid()}"
    assert {os.environ[name] for name in machine.FOLDERS} == {str(root / folder) for folder in machine.FOLDERS.values()}
    assert root.stat().st_mode & 0o777 == 0o700
    config = PretrainConfig().updated({"device": "cpu", "compile": True})
    (note,) = (n for n in resolve(config, set(), Machine(0, lambda: None)).notes if n.startswith("compile"))
    assert str(root) in note
    config = config.updated({"compile": False})
    assert not any(n.startswith("compile") for n in resolve(config, set(), Machine(0, lambda: None)).notes)


@pytest.mark.parametrize("why", ["no temporary folder", "another user's"])
def test_code_of_others_is_never_run(without_folders, tmp_path, monkeypatch, why):
    """Planted: the folder is used whoever owns it."""
    monkeypatch.chdir(tmp_path)
    without_folders.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("no home")))
    if why == "another user's":
        (tmp_path / "theirs").mkdir()
        (tmp_path / f"mimir_fast-{os.getuid()}").symlink_to(tmp_path / "theirs")
        without_folders.setattr(machine.tempfile, "gettempdir", lambda: str(tmp_path))
    else:
        without_folders.setattr(machine.tempfile, "gettempdir", lambda: (_ for _ in ()).throw(FileNotFoundError()))
    machine.keep_compiled_code()
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(tmp_path / ".mimir_fast" / "inductor")
    assert ".mimir_fast" in machine.kept_elsewhere()


def test_outputs_take_every_character(without_folders, monkeypatch):
    """Planted: no reconfigure, as under PYTHONIOENCODING=ascii."""
    without_folders.setenv("TORCHINDUCTOR_CACHE_DIR", "/mine")
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, "ascii"))
    machine.prepare_machine()
    print("Bilder für █", flush=True)
    assert raw.getvalue() == b"Bilder f\\xfcr \\u2588\n"


def test_a_closed_output_does_not_end_a_program(without_folders, monkeypatch):
    """Planted: the OSError goes through."""
    without_folders.setenv("TORCHINDUCTOR_CACHE_DIR", "/mine")
    reading, writing = os.pipe()
    os.close(reading)
    closed = io.TextIOWrapper(io.BufferedWriter(io.FileIO(writing, "w")), "ascii")
    closed.write("waits")
    monkeypatch.setattr(sys, "stdout", closed)
    machine.prepare_machine()
    with contextlib.suppress(OSError):
        closed.close()


@pytest.mark.parametrize(
    ("files", "cpus"),
    [
        ({"cpu.max": "150000 100000\n"}, 2),
        ({"cpu.max": "max 100000\n"}, 8),
        ({"cpu/cpu.cfs_quota_us": "300000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 3),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, 8),
        ({"cpu.max": "5000 100000\n"}, 1),
        ({}, 8),
    ],
)
def test_processors_are_those_of_the_container(tmp_path, monkeypatch, files, cpus):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(machine, "CGROUP", tmp_path)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(8)))
    assert machine.usable_cpus() == cpus


def test_threads_are_not_more_than_processors_unless_the_user_says_how_many(monkeypatch):
    monkeypatch.setattr(machine, "usable_cpus", lambda: 1)
    torch.set_num_threads(2)
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    machine.limit_threads()
    assert torch.get_num_threads() == 2
    monkeypatch.delenv("OMP_NUM_THREADS")
    machine.limit_threads()
    assert torch.get_num_threads() == 1
    monkeypatch.setattr(machine, "usable_cpus", lambda: 64)
    machine.limit_threads()
    assert torch.get_num_threads() == 1
