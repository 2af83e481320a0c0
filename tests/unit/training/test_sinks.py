"""Sinks that refuse: a full disk under the logs, a closed terminal, a service that fails."""

import errno
import io
import sys
from types import SimpleNamespace

import fsspec
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mimir_fast.checkpoints import atomic
from mimir_fast.training.events import Events, drop_points
from mimir_fast.training.sinks import Console, Lines, WandbRun
from tests.support.runs import lines

FULL = OSError(errno.ENOSPC, "No space left on device")


def points(folder):
    """{tag: [(x, value)]} as TensorBoard shows it."""
    shown = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    shown.Reload()
    return {tag: [(e.step, e.value) for e in shown.Scalars(tag)] for tag in shown.Tags()["scalars"]}


def test_lines_that_a_full_disk_refused_are_written_later(tmp_path, monkeypatch):
    """Planted: what was refused is forgotten; a part of a line stays in the file."""
    said, sink = [], Lines(tmp_path / "metrics.jsonl", lambda text: said.append(text))
    sink.add('{"update": 1}\n')
    sync = atomic.os.fsync

    def refuse(descriptor):
        raise FULL

    monkeypatch.setattr(atomic.os, "fsync", refuse)
    for update in (2, 3):
        sink.add(f'{{"update": {update}}}\n')
        assert lines(tmp_path / "metrics.jsonl") == [{"update": 1}]
    assert len(said) == 1
    assert "metrics.jsonl" in said[0]
    assert "No space left" in said[0]
    sink.close()
    assert "2 lines are missing" in said[1]
    monkeypatch.setattr(atomic.os, "fsync", sync)
    sink.add('{"update": 4}\n')
    assert [row["update"] for row in lines(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4]
    assert "nothing is missing" in said[2]


class Disk:
    """A file on a disk that takes a few bytes more, then none, then all."""

    def __init__(self, file):
        self.file, self.full = file, False

    def write(self, part):
        if self.full:
            self.file.write(part[:7])
            raise FULL
        return self.file.write(part)

    def __getattr__(self, name):
        return getattr(self.file, name)


def test_tensorboards_file_stays_readable_on_a_disk_that_fills_and_empties(tmp_path):
    """Planted: the half-written record stays, which hides all that follows."""
    said = []
    events = Events(str(tmp_path), said.append)
    events.add([("loss", 1.0, 0)])
    events.file = disk = Disk(events.file)
    disk.full = True
    events.add([("loss", 2.0, 1)])
    events.add([("loss", 3.0, 2)])
    disk.full = False
    events.add([("loss", 4.0, 3)])
    events.close()
    assert points(tmp_path) == {"loss": [(0, 1.0), (3, 4.0)]}
    assert len(said) == 1
    assert "log_dir: could not write" in said[0]


def test_a_log_dir_that_cannot_be_made_is_said_once_and_used_when_it_can(tmp_path):
    (tmp_path / "logs").write_text("a file in the way")
    said = []
    events = Events(str(tmp_path / "logs"), said.append)
    events.add([("loss", 1.0, 0)])
    assert len(said) == 1
    (tmp_path / "logs").unlink()
    events.add([("loss", 2.0, 1)])
    events.close()
    assert points(tmp_path / "logs") == {"loss": [(1, 2.0)]}


def test_points_that_come_again_are_dropped_and_no_others(tmp_path):
    """Two axes in one folder: losses at thousandths of epochs, accuracies at epochs, which purge_step alone would mix up."""
    first = Events(str(tmp_path), print)
    for epoch in range(3):
        first.add(
            [("loss", epoch, 1000 * epoch), ("loss", epoch + 0.5, 1000 * epoch + 500), ("perf/acc", epoch, epoch)]
        )
    first.close()
    (path,) = tmp_path.iterdir()
    path.write_bytes(path.read_bytes() + b"cut by a kill")
    drop_points(tmp_path, ("perf/acc",), 1, print)
    second = Events(str(tmp_path), print, 1500)
    second.add([("loss", 7.0, 1500), ("perf/acc", 8.0, 1), ("perf/acc", 9.0, 2)])
    second.close()
    found = points(tmp_path)
    assert found["perf/acc"] == [(0, 0.0), (1, 8.0), (2, 9.0)]
    assert found["loss"] == [(0, 0.0), (500, 0.5), (1000, 1.0), (1500, 7.0)]


def test_a_log_dir_at_a_url(monkeypatch, tmp_path):
    """Planted: a local folder of the URL's name; a package's own exception ends the run."""
    monkeypatch.chdir(tmp_path)
    store, said = fsspec.filesystem("memory"), []
    events = Events("memory://bucket/run/", said.append)
    events.add([("loss", 1.0, 0)])
    (name,) = store.find("/bucket/run")
    begun = len(store.cat(name))
    events.add([("loss", 2.0, 1)])
    assert len(store.cat(name)) == begun > 0, "uploaded at every point"
    events.close()
    (tmp_path / "events.out.tfevents.1").write_bytes(store.cat(name))
    assert points(tmp_path) == {"loss": [(0, 1.0), (1, 2.0)]}
    unknown = Events("nosuch://bucket", said.append)
    unknown.add([("loss", 1.0, 0)])
    unknown.close()
    assert len(said) == 1
    assert "warning: log_dir: could not write nosuch://bucket/events" in said[0]
    assert [path.name for path in tmp_path.iterdir()] == ["events.out.tfevents.1"]


def test_a_log_dir_that_cannot_be_changed_does_not_end_a_resume(tmp_path, monkeypatch):
    """Planted: the OSError goes through."""
    events = Events(str(tmp_path), print)
    events.add([("perf/acc", 1.0, 0)])
    events.close()

    def refuse(path, write, flag):
        raise OSError(f"{flag}: could not write {path}: Read-only file system")

    monkeypatch.setattr("mimir_fast.training.events.write_atomically", refuse)
    said = []
    drop_points(tmp_path, ("perf/acc",), 0, said.append)
    assert "log_dir: could not write" in said[0]


class Closed(io.TextIOWrapper):
    """An output whose terminal is gone."""

    def __init__(self):
        super().__init__(io.BytesIO(), "ascii")

    def isatty(self):
        return True

    def write(self, text):
        raise OSError(errno.EIO, "Input/output error")


def test_a_closed_terminal_does_not_end_a_run(monkeypatch):
    monkeypatch.setattr(sys, "stdout", Closed())
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    console = Console(3, 0)
    monkeypatch.setattr(console.bar, "update", Closed().write)
    console.say("a line")
    console.advance()
    assert console.bar is None
    console.note("loss 1")
    console.close()


@pytest.mark.parametrize("broken", ["init", "log", "finish"])
def test_a_service_that_fails_is_said_once(monkeypatch, broken):
    def fail(*words, **more):
        raise RuntimeError("no route to host\nand so on")

    parts = {"log": lambda *row, **more: None, "finish": lambda: None, "id": "abc"}
    init = {"init": lambda **words: SimpleNamespace(**(parts | ({broken: fail} if broken != "init" else {})))}
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(**(init | ({"init": fail} if broken == "init" else {}))))
    said = []
    run = WandbRun("out", {}, said.append)
    for update in (1, 2):
        run.log({"loss": 1.0, "mi": None}, update)
    run.close()
    assert said == ["warning: wandb: RuntimeError: no route to host; training goes on without it"]
