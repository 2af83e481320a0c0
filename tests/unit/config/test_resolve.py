"""What a run settles before it starts, and how a verb ends."""

import pytest
import torch

from mimir_fast.cli.errors import guarded
from mimir_fast.config.resolve import settled_device


def test_a_device_that_is_not_there(monkeypatch):
    said = []
    assert settled_device("cpu", {"device"}) == "cpu"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert settled_device("cuda", set(), said.append) == "cpu"
    assert "running on the CPU" in said[0]
    with pytest.raises(ValueError, match="device: got cuda:1, no CUDA device is available here; pass --device cpu"):
        settled_device("cuda:1", {"device"})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert [settled_device(name, {"device"}) for name in ("cuda", "cuda:1")] == ["cuda", "cuda:1"]
    for name in ("cuda:2", "cuda:x", "cuda:-1"):
        with pytest.raises(ValueError, match=f"device: got {name}, this machine has 2 CUDA devices"):
            settled_device(name, {"device"})


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (None, 0, ""),
        (ValueError("eps: wrong"), 2, "mimir-fast x: error: eps: wrong\n"),
        (OSError("disk full"), 1, "mimir-fast x: error: disk full\n"),
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried.\nMore"),
            1,
            "mimir-fast x: error: batch_size: CUDA out of memory;",
        ),
        (KeyboardInterrupt(), 130, "mimir-fast x: nothing is lost\n"),
    ],
)
def test_every_end_is_a_status_and_a_line(capsys, error, status, line):
    def body():
        if error:
            raise error
        return 0

    assert guarded("mimir-fast x", body, "nothing is lost") == status
    said = capsys.readouterr().err
    assert said.startswith(line)
    assert said.count("\n") == bool(line)


def test_what_is_a_bug_stays_a_traceback():
    with pytest.raises(RuntimeError):
        guarded("mimir-fast x", lambda: (_ for _ in ()).throw(RuntimeError("bug")), "")
