"""Logs that a run finds: what a resume keeps of them, and how they are set aside."""

import json

from mimir_fast.training.logs import drop_lines, set_aside


def test_bytes_that_are_no_text_do_not_stop_a_resume_and_other_lines_stay_as_they_are(tmp_path):
    """Planted: read_text, which raises UnicodeDecodeError."""
    path = tmp_path / "metrics.jsonl"
    good = [
        json.dumps({"update": n, "epoch": n / 4, "word": "\u00fc"}, ensure_ascii=False).encode() for n in range(1, 5)
    ]
    path.write_bytes(
        b"\n".join([good[0], b'{"update": 2, "epoch": \xff}', b"[3]", b"7", good[1], good[2], good[3]]) + b"\n"
    )
    drop_lines(path, "update", 3)
    assert path.read_bytes() == b"\n".join(good[:3]) + b"\n"
    drop_lines(path, "update", 3, 0.5)
    assert path.read_bytes() == good[0] + b"\n"


def test_logs_of_earlier_runs_are_all_kept(tmp_path):
    for number in range(3):
        (tmp_path / "log.txt").write_text(str(number))
        set_aside(tmp_path / "log.txt")
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == {
        "log.txt.old": "0",
        "log.txt.old.2": "1",
        "log.txt.old.3": "2",
    }
