"""How a verb ends."""

import pytest
import torch

from mimir_fast.cli.errors import guarded


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
