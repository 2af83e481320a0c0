"""The lock of a folder: who holds it, when it is taken over, that it goes when its owner does."""

import json
import os
import subprocess
import sys
import threading

import pytest

from mimir_fast.checkpoints import lock
from mimir_fast.checkpoints.lock import NAME, FolderInUseError, locked


def owner(folder, **changes):
    """Write the lock of another program: this one's description, changed."""
    folder.mkdir(exist_ok=True)
    (folder / NAME).write_text(json.dumps(lock._describe_self() | changes))


def test_a_folder_has_one_writer_at_a_time(tmp_path):
    with locked(tmp_path / "new"):
        found = json.loads((tmp_path / "new" / NAME).read_text())
        assert found["process"] == os.getpid()
        with (
            pytest.raises(FolderInUseError, match=f"output_dir: .*new is in use by process {os.getpid()} on ") as error,
            locked(tmp_path / "new"),
        ):
            pass
        assert found["host"] in str(error.value)
        assert "\n" not in str(error.value)
    with locked(tmp_path / "new"):
        pass
    assert not list((tmp_path / "new").iterdir())


def test_a_dead_owner_on_this_machine_is_succeeded_at_once(tmp_path, monkeypatch):
    """Planted: the process number alone is compared (numbers come again)."""
    monkeypatch.setattr(lock, "_touched", lambda path: pytest.fail("waited for a process of this machine"))
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    for changes in ({"process": ended.pid, "started": "1"}, {"started": "before the last boot"}):
        owner(tmp_path, **changes)
        with locked(tmp_path):
            assert json.loads((tmp_path / NAME).read_text())["process"] == os.getpid()


@pytest.mark.parametrize("alive", [True, False])
def test_an_owner_on_another_machine_is_watched(tmp_path, monkeypatch, alive):
    """Planted: an owner elsewhere counts as dead, or as alive for ever."""
    monkeypatch.setattr(lock, "PATIENCE", 0.5)
    owner(tmp_path, machine="elsewhere", host="node7", process=12)
    times, said = iter(range(1000)), []
    monkeypatch.setattr(lock, "_touched", lambda path: next(times) if alive else 0)
    if alive:
        with pytest.raises(FolderInUseError, match="process 12 on node7"), locked(tmp_path, say=said.append):
            pass
    else:
        with locked(tmp_path, say=said.append):
            assert json.loads((tmp_path / NAME).read_text())["process"] == os.getpid()
    assert "waiting up to" in said[0]


def test_a_lock_that_says_nothing_is_watched_too(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "PATIENCE", 0.2)
    (tmp_path / NAME).write_text("{cut")
    with locked(tmp_path):
        pass


def test_the_owner_shows_signs_of_life_until_it_is_succeeded(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "BEAT", 0.01)
    seen = []
    beaten = threading.Event()

    def touch(path):
        seen.append(path)
        beaten.set()

    monkeypatch.setattr(lock.os, "utime", touch)
    with locked(tmp_path):
        assert beaten.wait(60)
        owner(tmp_path, process=1, token="another")
    # another's lock is left alone
    assert json.loads((tmp_path / NAME).read_text())["token"] == "another"


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(OSError, match=r"output_dir: could not write .*file"), locked(tmp_path / "file" / "out"):
        pass
