"""The file of measurements: kept, damaged, of another environment, read-only, written by two at once."""

import json

import pytest

from mimir_fast.tuning import remembered
from mimir_fast.tuning.measuring import Trial
from mimir_fast.tuning.remembered import file_of, recall, remember
from tests.support.pretend import candidates

HERE = {"device": "NVIDIA H100 80GB HBM3", "driver": "570.1", "torch": "2.14", "triton": "3.8", "mimir_fast": "0.1"}
TRIALS = [Trial(c, s, w) for c, s, w in zip(candidates("short/rows32", "sdpa"), (1e-3, None), ("", "out of memory"))]


def test_what_is_kept_comes_back(tmp_path):
    said: list[str] = []
    remember(HERE, {"a": TRIALS}, said.append, tmp_path)
    remember(HERE, {"b": TRIALS[:1]}, said.append, tmp_path)
    assert recall(HERE, said.append, tmp_path) == {"a": TRIALS, "b": TRIALS[:1]}
    assert file_of(HERE, tmp_path).name.startswith("nvidia-h100-80gb-hbm3-")
    assert recall(HERE | {"driver": "575.0"}, said.append, tmp_path) == {}
    assert said == []


def damaged(path, change) -> None:
    path.write_text(change(path.read_text()))


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda text: text[: len(text) // 2], "it cannot be read (JSONDecodeError"),
        (lambda text: "", "it cannot be read"),
        (lambda text: "[]", "it cannot be read (TypeError"),
        (lambda text: text.replace('"format": 1', '"format": 2'), "its format is 2, not 1"),
        (lambda text: text.replace('"570.1"', '"1.0"'), "it was measured with driver 1.0, here 570.1"),
        (lambda text: text.replace('"candidate"', '"other"'), "it cannot be read (KeyError"),
    ],
)
def test_a_file_that_cannot_be_used_is_one_line_and_replaced(tmp_path, change, why):
    """Must fail for: a driver that is not compared; a KeyError that ends the run."""
    said: list[str] = []
    remember(HERE, {"a": TRIALS}, said.append, tmp_path)
    damaged(file_of(HERE, tmp_path), change)
    assert recall(HERE, said.append, tmp_path) == {}
    (line,) = said
    assert line.startswith(f"tune: {file_of(HERE, tmp_path)} is not used: {why}")
    remember(HERE, {"b": TRIALS}, said.append, tmp_path)
    assert recall(HERE, said.append, tmp_path) == {"b": TRIALS}
    assert len(said) == 1


def test_where_nothing_can_be_written_it_is_one_line(tmp_path):
    """A file where the folder should be: nothing is refused to whoever may be root here."""
    said: list[str] = []
    (tmp_path / "file").write_text("")
    remember(HERE, {"a": TRIALS}, said.append, tmp_path / "file")
    (line,) = said
    assert line.startswith("tune: what was measured is not kept: tune: could not write")
    assert recall(HERE, said.append, tmp_path / "file") == {}


def test_two_that_write_at_once_leave_a_whole_file(tmp_path, monkeypatch):
    """The second writes between the first's reading and writing."""
    write, said = remembered.write, []

    def overtaken(*arguments) -> None:
        monkeypatch.setattr(remembered, "write", write)
        remember(HERE, {"b": TRIALS}, said.append, tmp_path)
        write(*arguments)

    monkeypatch.setattr(remembered, "write", overtaken)
    remember(HERE, {"a": TRIALS}, said.append, tmp_path)
    assert recall(HERE, said.append, tmp_path) == {"a": TRIALS}
    json.loads(file_of(HERE, tmp_path).read_text())
    assert said == []
