"""The checkpoints of a folder: saving on a full disk, order, choosing, what is moved aside and removed."""

import os
import resource
import subprocess
import sys

import pytest
import torch

from mimir_fast.checkpoints.errors import CheckpointError
from mimir_fast.checkpoints.folder import (
    clean_folder,
    drop_resume_points,
    find_checkpoints,
    read_newest,
    save_checkpoint,
    supersede,
)
from mimir_fast.checkpoints.run_state import Position
from tests.unit.checkpoints.test_run_state import state_of, trained


def test_order_of_checkpoints_and_rotation(tmp_path):
    names = [
        "checkpoint-0.pth",
        "checkpoint-20.pth",
        "resume-20-300.pth",
        "resume-21-0.pth",
        "resume-21-40.pth",
        "resume-3-9.pth",
    ]
    for name in [*names, "failed-30-1.pth", "resume-21-80.pth.tmp", "notes.txt"]:
        (tmp_path / name).write_bytes(b"x")
    found = [path.name for path in find_checkpoints(tmp_path)]
    assert found == [
        "resume-21-40.pth",
        "checkpoint-20.pth",
        "resume-21-0.pth",
        "resume-20-300.pth",
        "resume-3-9.pth",
        "checkpoint-0.pth",
    ]
    drop_resume_points(tmp_path)
    assert (tmp_path / "resume-21-80.pth.tmp").exists()
    assert not (tmp_path / "resume-3-9.pth").exists()
    clean_folder(tmp_path)
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {
        "resume-21-40.pth",
        "checkpoint-20.pth",
        "resume-21-0.pth",
        "checkpoint-0.pth",
        "failed-30-1.pth",
        "notes.txt",
    }


@pytest.mark.parametrize("keep", [0, 1, 100, 0.5, 0.999])
def test_truncated_newest_falls_back(tmp_path, keep):
    model, updater = trained()
    for epoch in (0, 1):
        save_checkpoint(tmp_path / f"checkpoint-{epoch}.pth", state_of(model, updater, Position(epoch=epoch + 1)))
    newest = tmp_path / "checkpoint-1.pth"
    size = newest.stat().st_size
    os.truncate(newest, int(size * keep) if isinstance(keep, float) else keep)
    lines = []
    contents = read_newest(tmp_path, lines.append)
    assert contents.file == str(tmp_path / "checkpoint-0.pth")
    assert contents.epoch == 0
    assert len(lines) == 1
    assert "checkpoint-1.pth" in lines[0]
    os.truncate(tmp_path / "checkpoint-0.pth", 10)
    with pytest.raises(CheckpointError, match="none of the 2"):
        read_newest(tmp_path, lines.append)
    assert read_newest(tmp_path / "empty", print) is None


def test_full_disk_keeps_the_previous_file(tmp_path):
    """A file-size limit in a child process stands for the full disk: the write fails half way."""
    path = tmp_path / "checkpoint-0.pth"
    save_checkpoint(path, {"model": {"w": torch.zeros(10)}})
    good = path.read_bytes()
    code = f"""
import resource, torch
from pathlib import Path
from mimir_fast.checkpoints.errors import CheckpointError
from mimir_fast.checkpoints.folder import save_checkpoint
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    save_checkpoint(Path({str(path)!r}), {{"model": {{"w": torch.zeros(1_000_000)}}}})
except CheckpointError as error:
    print("refused:", error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "refused: output_dir: could not save" in done.stdout, done.stderr
    assert path.read_bytes() == good
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-0.pth"]
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] != 100_000


def test_checkpoints_past_the_start_are_moved_aside(tmp_path):
    for name in ("checkpoint-0.pth", "checkpoint-20.pth", "resume-3-10.pth", "resume-3-11.pth", "failed-9-9.pth"):
        (tmp_path / name).write_bytes(b"x")
    moved = supersede(tmp_path, 3, 10)
    assert sorted(path.name for path in moved) == ["checkpoint-20.pth", "resume-3-11.pth"]
    assert sorted(path.name for path in (tmp_path / "superseded").iterdir()) == ["checkpoint-20.pth", "resume-3-11.pth"]
    assert [path.name for path in find_checkpoints(tmp_path)] == ["resume-3-10.pth", "checkpoint-0.pth"]
