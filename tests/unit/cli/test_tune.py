"""mimir-fast tune: its table, what it remembers, and files that carry that to other machines."""

import os

import pytest

from mimir_fast.cli import tune
from mimir_fast.tuning import decisions
from mimir_fast.tuning.table import Peaks
from tests.support.pretend import OUT_OF_MEMORY, Pretend

WORDS = "--device cpu --compile --model mae_vit_nano --input_size 16 --patch_size 4 --batch_size 4".split()
ENCODER, DECODER = "attention 5x3x32 fp32", "attention 17x16x8 fp32"
TABLE = {ENCODER: {"math": 4e-6, "sdpa": 8e-6}, DECODER: {"narrow": OUT_OF_MEMORY, "math": "output: off", "sdpa": 2e-3}}


@pytest.fixture(autouse=True)
def measured(monkeypatch, tmp_path):
    """The problems that are measured on the pretend device."""
    problems = []

    def bench(problem, *_):
        problems.append(problem)
        return Pretend(TABLE[str(problem)])

    monkeypatch.setattr(decisions, "Workbench", bench)
    monkeypatch.setattr(tune, "measured_peaks", lambda *_: Peaks(1e12, 1e11))
    monkeypatch.setenv("HOME", str(tmp_path))
    # The verb sets it for its process, which here goes on.
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", os.environ.get("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor")))
    return problems


def test_the_table(capsys, measured):
    """Must fail for: the peak of products for an attention."""
    assert tune.main(WORDS) == 0
    printed = capsys.readouterr().out
    # 11 units of 4 images, 5 tokens, 3 heads of 32 numbers of 4 bytes in 4 us, of 100 GB/s
    assert (
        f"{ENCODER}, batch 4, forward and backward pass:\n  math      0.004 ms     21.12 GB/s      21.1%  chosen"
        in printed
    )
    assert "  sdpa      0.008 ms     10.56 GB/s      10.6%\n" in printed
    assert "  narrow  out: out of memory\n  math    out: WRONG VALUES: output: off\n" in printed
    assert len(measured) == 2
    assert tune.main(WORDS) == 0
    assert len(measured) == 2
    assert tune.main([*WORDS, "--tune", "again"]) == 0
    assert len(measured) == 4


def test_measurements_are_carried_to_other_machines(tmp_path, capsys, monkeypatch, measured):
    assert tune.main([*WORDS, "--export", str(tmp_path / "found.json")]) == 0
    monkeypatch.setenv("HOME", str(tmp_path / "other"))
    assert tune.main([*WORDS, "--import", str(tmp_path / "found.json")]) == 0
    assert len(measured) == 2, "imported and not measured"
    environment = decisions.environment_of
    monkeypatch.setattr(tune, "environment_of", lambda *a: environment(*a) | {"driver": "580.1"})
    assert tune.main([*WORDS, "--import", str(tmp_path / "found.json")]) == 2
    assert "found.json: it was measured with driver , here 580.1" in capsys.readouterr().err
    assert tune.main([*WORDS, "--import", str(tmp_path / "none.json")]) == 2
    assert tune.main([*WORDS, "--export", str(tmp_path)]) == 1
    assert "export: could not write" in capsys.readouterr().err


def test_candidates_that_were_too_late_for_a_run_are_tried_ahead(monkeypatch, measured):
    """Must fail for: what a run remembers in part is whole to the verb."""
    with monkeypatch.context() as hurried:
        hurried.setattr(tune, "LIMIT", -1)
        assert tune.main(WORDS) == 0
    assert len(measured) == 2
    assert tune.main(WORDS) == 0
    # Of the decoder's, the first two are out and the third was measured.
    assert [str(problem) for problem in measured[2:]] == [ENCODER]


@pytest.mark.parametrize("extra", ["--no_compile", "--tune off", "--attention sdpa"])
def test_where_nothing_is_measured_that_is_wrong_input(extra, capsys):
    assert tune.main([*WORDS, *extra.split()]) == 2
    assert "tune: with these flags nothing is measured" in capsys.readouterr().err
