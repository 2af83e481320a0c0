"""The checkpoints of a folder: saving on a full disk, order, choosing, what is moved aside and removed."""

import os
import resource
import subprocess
import sys

import pytest
import torch

from mimir_fast.checkpoints.errors import CheckpointError
from mimir_fast.checkpoints.folder import (
    drop_resume_points,
    find_checkpoints,
    read_newest,
    save_checkpoint,
    set_best_aside,
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
        "resume-21-0.pth",
        "checkpoint-20.pth",
        "resume-20-300.pth",
        "resume-3-9.pth",
        "checkpoint-0.pth",
    ]
    everything = {path.name for path in tmp_path.iterdir()}
    # an older point goes when both newer ones can be read, not before
    drop_resume_points(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == everything
    for name in ("resume-21-40.pth", "resume-21-0.pth"):
        save_checkpoint(tmp_path / name, {"epoch": 20})
    drop_resume_points(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == everything - {"resume-20-300.pth", "resume-3-9.pth"}


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


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_checkpoints_past_the_start_are_moved_aside_and_no_earlier_ones_overwritten(tmp_path):
    for name in ("checkpoint-0.pth", "resume-3-10.pth", "failed-9-9.pth"):
        (tmp_path / name).write_bytes(b"x")
    assert supersede(tmp_path, 3, 10) == []
    (tmp_path / "metrics.jsonl").write_text("rows")
    for times, folder in enumerate(("superseded", "superseded.2", "superseded.3")):
        for name in ("checkpoint-20.pth", "resume-3-11.pth"):
            (tmp_path / name).write_bytes(b"x" * times)
        said = supersede(tmp_path, 3, 10)
        assert len(said) == 2
        assert all(line.endswith(f"was moved to {folder}/") for line in said)
        assert names(tmp_path / folder) == ["checkpoint-20.pth", "metrics.jsonl", "resume-3-11.pth"]
        assert (tmp_path / folder / "resume-3-11.pth").stat().st_size == times
    assert [path.name for path in find_checkpoints(tmp_path)] == ["resume-3-10.pth", "checkpoint-0.pth"]
    for folder in ("superseded", "superseded.2"):
        (tmp_path / "best.pth").write_bytes(b"x")
        assert folder in set_best_aside(tmp_path, None)[0]


def test_what_is_left_after_a_failed_save_is_said_as_it_is(tmp_path, monkeypatch):
    """Planted: "older checkpoints are intact" whatever the folder holds."""

    def full(path, write, flag=""):
        raise OSError("No space left on device")

    monkeypatch.setattr("mimir_fast.checkpoints.folder.write_atomically", full)
    for folder, words in ((tmp_path, "holds no older checkpoint"), (tmp_path / "gone", "is gone")):
        with pytest.raises(CheckpointError, match=words) as error:
            save_checkpoint(folder / "resume-0-2.pth", {})
        assert "intact" not in str(error.value)
    (tmp_path / "resume-0-1.pth").write_bytes(b"x")
    with pytest.raises(CheckpointError, match=r"intact \(newest: resume-0-1.pth\)"):
        save_checkpoint(tmp_path / "resume-0-2.pth", {})


def test_a_text_file_as_the_newest_checkpoint_is_named_and_passed_over(tmp_path):
    save_checkpoint(tmp_path / "checkpoint-0.pth", state_of(*trained(), Position(epoch=1)))
    (tmp_path / "resume-9-9.pth").write_text("not a checkpoint\n")
    lines = []
    assert read_newest(tmp_path, lines.append).epoch == 0
    assert "resume-9-9.pth" in lines[0]


def test_a_best_epoch_past_the_start_of_a_run_is_not_its_best(tmp_path):
    """Planted: best.pth of epoch 7 stays where a run resumes at epoch 4, whose best epoch is 3."""
    save_checkpoint(tmp_path / "best.pth", {"model": {"w": torch.zeros(1)}, "mimir_fast": {"best": [40.0, 50.0, 7.0]}})
    assert set_best_aside(tmp_path, [40.0, 50.0, 7.0]) == []
    (line,) = set_best_aside(tmp_path, [30.0, 40.0, 3.0])
    assert "has no file until a better one comes" in line
    assert names(tmp_path) == ["superseded"]
    (tmp_path / "best.pth").write_text("damaged")
    assert set_best_aside(tmp_path, [30.0, 40.0, 3.0])
    assert (tmp_path / "superseded.2" / "best.pth").exists()
