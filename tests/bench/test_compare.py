"""python -m bench compare: what counts as the same thing, what as noise, what as a regression; what it refuses."""

import ctypes
import json
from pathlib import Path

import pytest

from bench import records
from bench.__main__ import main
from bench.rows import KINDS, load, newest
from tests.bench.records import H100, TRAINER, kernel, losses, pairs, step, training


@pytest.fixture
def judge(tmp_path, capsys):
    """Exit status and output of comparing two lists of records."""

    def run(before: list[dict], after: list[dict], *words: str) -> tuple[int, str]:
        files = [tmp_path / "A.jsonl", tmp_path / "B.jsonl"]
        for file, found in zip(files, (before, after)):
            file.write_text("".join(json.dumps(record) + "\n" for record in found))
        status = main(["compare", *map(str, files), *words])
        shown = capsys.readouterr()
        return status, shown.out + shown.err

    return run


def test_beyond_noise_and_margin_is_a_regression(judge):
    status, text = judge([kernel(1.0, 0.98, 1.02)], [kernel(1.1, 1.08, 1.12)])
    assert (status, text.splitlines()[0].split()[0]) == (1, "REGRESSION")
    assert "ms 1 [0.98, 1.02] -> 1.1 [1.08, 1.12]  (+10.0%)" in text
    assert "20th to 80th percentile" in text
    assert "op mlp, recipe imagenet_vit_b encoder, dtype bf16, direction forward, impl ours; " + H100 in text
    status, text = judge([kernel(1.0, 0.98, 1.02)], [kernel(1.1, 1.08, 1.12)], "--margin", "11")
    assert (status, text.split()[0]) == (0, "worse")
    status, text = judge([kernel(1.1, 1.08, 1.12)], [kernel(1.0, 0.98, 1.02)])
    assert (status, text.split()[0]) == (0, "better")


def test_overlapping_intervals_are_noise(judge):
    status, text = judge([kernel(1.0, 0.9, 1.2)], [kernel(1.3, 1.15, 1.4)])
    assert status == 0
    assert text.startswith("1 figures of 1 rows: 0 regressions beyond 3 %, 0 worse, 0 better; 1 within the noise")


def test_repeated_rows_are_the_noise_where_no_percentiles_are(judge):
    before, slow = [step(ms=ms) for ms in (50.0, 53.0, 51.0)], [step(ms=ms) for ms in (52.9, 60.0)]
    assert judge(before, slow)[0] == 0
    status, text = judge(before, [step(ms=ms) for ms in (53.1, 60.0)])
    assert status == 1
    assert "ms 51 [50, 53] -> 56.55 [53.1, 60]" in text
    assert "lowest to highest of 3 rows; lowest to highest of 2 rows" in text
    status, text = judge([step(ms=50.0)], [step(ms=52.0)])
    assert status == 1
    assert "1 row: unknown" in text


def test_priced_figures_compare_exactly(judge):
    assert judge([step(40.0)], [step(40.0)])[0] == 0
    assert judge([step(40.0)], [step(40.0 * (1 + 1e-12))])[0] == 0  # a sum in another order
    status, text = judge([step(40.0)], [step(40.01)], "--margin", "50")
    assert (status, text.split()[0]) == (1, "REGRESSION")
    assert "noise: exact" in text
    assert judge([step(40.0)], [step(39.99)])[1].startswith("better")


def test_higher_is_better_where_it_is(judge):
    status, text = judge([pairs([1.9, 2.0, 2.1])], [pairs([1.4, 1.5, 1.6])])
    assert (status, "ratio 2 [" in text) == (1, True)
    assert judge([pairs([1.4, 1.5, 1.6])], [pairs([1.9, 2.0, 2.1])])[0] == 0
    # updates of 1.0 to 1.4 s and of 1.5 to 1.6 s, 128 images each
    status, text = judge([training(110.0, 1.0, 1.4)], [training(83.0, 1.5, 1.6)])
    assert (status, "images/s 110 [91.429, 128] -> 83 [80, 85.333]" in text) == (1, True)
    assert judge([training(110.0, 1.0, 1.4)], [training(95.0, 1.3, 1.5)])[0] == 0


def test_losses_are_as_sure_as_their_seeds(judge):
    assert judge([losses(0.80, 0.82, 0.84)], [losses(0.80, 0.85, 0.86)])[0] == 0
    assert judge([losses(0.80, 0.82, 0.84)], [losses(0.88, 0.89, 0.90)])[0] == 1


def test_the_same_thing_is_the_same_in_every_setting(judge):
    other = step(41.0, config=TRAINER | {"residual_dtype": "bf16"})
    status, text = judge([step()], [step(), other])
    assert status == 0
    (only,) = [line for line in text.splitlines() if line.startswith("only in")]
    assert "B.jsonl: step: variant ours, " in only
    assert "residual_dtype bf16" in only
    config = {name: value for name, value in TRAINER.items() if name != "residual_dtype"}
    moved = step(config=config | {"output_dir": "elsewhere"})
    assert "5 exactly equal" in judge([moved], [step()])[1]  # from before the flag, written to another folder
    status, text = judge([step()], [other])
    assert status == 2
    assert "no figure in common" in text


def test_of_one_file_the_newest_commit_counts(judge, tmp_path):
    old = kernel(1.0, 0.9, 1.1, commit="a0", date="2026-01-01T00:00:00+00:00")
    new = kernel(2.0, 1.9, 2.1, commit="a2")
    assert judge([new, old], [new])[0] == 0  # by date, not by place
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(map(json.dumps, (new, kernel(3.0, commit="a2"), old))))
    ((_, rows),) = newest(load(file)).items()
    assert [row.record["ms"] for row in rows] == [2.0, 3.0]


def test_different_devices_are_refused(judge):
    slow = kernel(9.0, 8.9, 9.1, device="NVIDIA A100")
    status, text = judge([kernel(1.0, 0.9, 1.1)], [slow])
    assert (status, len(text.splitlines())) == (2, 1)
    assert "devices differ: " in text
    assert "of NVIDIA A100; --across_devices" in text
    assert judge([kernel(1.0, 0.9, 1.1)], [slow], "--across_devices")[0] == 1
    assert judge([kernel(1.0, 0.9, 1.1)], [kernel(1.0, 0.9, 1.1), slow])[0] == 0  # one's devices are the other's too
    status, text = judge([kernel(1.0)], [kernel(1.0), slow], "--across_devices")
    assert (status, "expected one device in a file" in text) == (2, True)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"kind": "kernels", ', "no JSON"),
        ("[1, 2]", "expected a JSON object"),
        ('{"kind": "weather", "ms": 1}', "no known kind"),
        (json.dumps(kernel(float("nan"))), "ms: expected a finite number, got nan"),
        (json.dumps({k: v for k, v in kernel(1.0).items() if k != "direction"}), "of kind kernels without 'direction'"),
        (json.dumps({**step(), "totals": {}}), "of kind step without 'bound_ms'"),
        (json.dumps({k: v for k, v in step().items() if k != "commit"}), "of kind step without 'commit'"),
    ],
)
def test_a_broken_line_names_file_and_line(tmp_path, capsys, line, said):
    file = tmp_path / "rows.jsonl"
    file.write_text(f"{json.dumps(kernel(1.0))}\n\n{line}\n")
    assert main(["compare", str(file), str(file)]) == 2
    error = capsys.readouterr().err
    assert f"{file}:3: " in error
    assert said in error
    assert error.count("\n") == 1


def test_wrong_input_is_one_line(judge, tmp_path, capsys):
    assert main(["compare", str(tmp_path / "none.jsonl"), str(tmp_path / "none.jsonl")]) == 2
    assert "none.jsonl: cannot be read" in capsys.readouterr().err
    status, text = judge([kernel(1.0)], [kernel(1.0)], "--margin", "-1")
    assert (status, "margin: expected 0 or more, got -1" in text) == (2, True)


def test_every_stored_record_is_a_row():
    known = {kind.name for kind in KINDS}
    for file in sorted(records.RESULTS.glob("*.jsonl")):
        rows = load(file)
        assert rows, file
        assert {row.kind.name for row in rows} <= known
        assert all(row.readings for row in rows), file
    assert {row.kind.name for row in load(Path(records.RESULTS) / "step.jsonl")} == {"step"}


def test_a_heading_tells_the_driver_where_there_is_a_gpu(monkeypatch):
    class Cuda:
        @staticmethod
        def cuDriverGetVersion(pointer) -> int:  # noqa: N802
            pointer._obj.value = 12080
            return 0

    monkeypatch.setattr(ctypes, "CDLL", lambda name: Cuda)
    assert [records.heading(name)["driver"] for name in ("cpu", "pretend-h100", H100)] == [None, None, "12.8"]
