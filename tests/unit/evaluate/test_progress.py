"""Progress of an evaluation: one bar for all processes, with a time left that counts what each has done."""

import numpy as np

from mimir_fast.evaluate.progress import AttackProgress, Bar
from mimir_fast.evaluate.records import Record


def test_the_bar_of_the_first_process_counts_the_images_of_all(monkeypatch):
    """Planted, each was seen to fail: the others' images counted anew at every update; their broken images still to do."""
    shown = []
    monkeypatch.setattr(Bar, "show", lambda self, what, text, done, left: shown.append((what, text, done, left)))
    record = Record("nowhere.npz", np.arange(16))
    progress = AttackProgress("aa", [2, 3], False, lambda line: None)
    progress.begin()
    right, wrong = np.zeros(2, np.int64), np.array([0, 1])
    # Two of its own, one of them broken, then four of others, then two of its own; each costs 2, and 3 in the next round.
    record.note(np.array([0, 1]), 1, right, wrong, np.ones(2, np.float32))
    progress.update(record, 1, "apgd-ce", 2)
    assert shown[-1][0] == "aa apgd-ce"
    assert shown[-1][1].startswith("2/16 images, at most 93.8% robust, ")
    assert shown[-1][2:] == (4, 2 * 14 + 3 * 15)
    record.note(np.array([4, 5]), 1, right, right, np.ones(2, np.float32))
    progress.update(record, 1, "apgd-ce", 2, others=(4, 3))
    assert shown[-1][1].startswith("8/16 images, at most 75.0% robust, ")
    assert shown[-1][2:] == (16, 2 * 8 + 3 * 12)
    record.note(np.array([8, 9]), 1, right, right, np.ones(2, np.float32))
    progress.update(record, 1, "apgd-ce", 2, others=(4, 3))
    assert shown[-1][1].startswith("10/16 images, at most 75.0% robust, ")
    assert shown[-1][2:] == (20, 2 * 6 + 3 * 12)


def test_other_processes_show_nothing(monkeypatch):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    assert Bar(print, shown=False).bar is None
