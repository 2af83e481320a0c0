"""How a verb ends."""

import os
import re
import signal
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from mimir_fast import cli
from mimir_fast.cli.errors import guarded
from mimir_fast.cli.troubleshooting import ENTRIES, PAGE


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
        (RuntimeError("can't start new thread"), 1, "mimir-fast x: error: batch_size: host memory ran out;"),
        (MemoryError(), 1, "mimir-fast x: error: batch_size: host memory ran out;"),
        (
            RuntimeError(
                "[enforce fail at alloc_cpu.cpp:1] DefaultCPUAllocator: can't allocate memory: you tried 9 bytes"
            ),
            1,
            "mimir-fast x: error: batch_size: host memory ran out;",
        ),
        (
            RuntimeError("[/x/gloo/transport/tcp/pair.cc:1] Connection closed by peer [127.0.0.1]:1\nmore"),
            1,
            "mimir-fast x: error: another process of this run ended or does not answer",
        ),
        (
            RuntimeError(
                "Gloo connectFullMesh failed with [/x/pair.cc:1] timed out connecting: SO_ERROR: Connection refused"
            ),
            1,
            "mimir-fast x: error: another process of this run ended or does not answer",
        ),
        (
            torch.distributed.DistBackendError("NCCL error in: x.cpp\nmore"),
            1,
            "mimir-fast x: error: another process of this run ended or does not answer",
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


def test_messages_point_to_the_entry_that_says_more(capsys):
    """Every entry of the table is in the page, under its heading, and is what the program says.

    Planted: a heading that the page does not have, words that no message has, an error without the reference.
    """
    page = (Path(cli.__file__).parents[2] / PAGE).read_text(encoding="utf-8")
    sources = "".join(path.read_text(encoding="utf-8") for path in Path(cli.__file__).parents[1].rglob("*.py"))
    for heading, entries in ENTRIES.items():
        (section,) = re.findall(rf"^## {heading}\n(.*?)(?=^## |\Z)", page, re.DOTALL | re.MULTILINE)
        symptoms = "".join(line.split(" | ")[0] for line in section.splitlines())
        for words in entries:
            assert words in symptoms, (heading, words)
            # "out of memory" is torch's.
            assert words == "out of memory" or sources.count(words) > sources.count(f'"{words}"'), words
    assert guarded("x", partial(_raise, OSError("disk full")), "") == 1
    assert PAGE not in capsys.readouterr().err
    for error in (torch.OutOfMemoryError("CUDA out of memory. Tried."), MemoryError()):
        guarded("x", partial(_raise, error), "")
        assert capsys.readouterr().err.endswith(f" ({PAGE}, Memory, data workers, signals)\n")


def _raise(error: Exception) -> int:
    raise error


def test_a_ctrl_c_while_the_line_of_the_last_one_is_printed_changes_nothing(monkeypatch, capsys):
    """Planted: the line is printed with the handler of before."""

    class Stderr:
        def write(self, text):
            os.kill(os.getpid(), signal.SIGINT)

        def flush(self):
            pass

    before = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(sys, "stderr", Stderr())
    assert guarded("mimir-fast x", lambda: (_ for _ in ()).throw(KeyboardInterrupt()), "stopped") == 130
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.parametrize("verb", cli.VERBS)
def test_ctrl_c_while_a_verb_is_imported_is_one_line(monkeypatch, capsys, verb):
    def importing(name):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli.importlib, "import_module", importing)
    assert cli.main([verb]) == 130
    assert capsys.readouterr().err == f"mimir-fast {verb}: stopped\n"


@pytest.mark.parametrize("verb", cli.VERBS)
def test_every_verb_that_runs_as_a_module_goes_through_the_same_door(verb):
    """`python -m mimir_fast.VERB` imports nothing slow before Ctrl-C is met."""
    path = Path(cli.__file__).parents[1] / verb / "__main__.py"
    if path.exists():
        assert f'run_verb("{verb}", sys.argv[1:])' in path.read_text()
        assert path.read_text().count("import") == 2


def test_what_is_a_bug_stays_a_traceback():
    with pytest.raises(RuntimeError):
        guarded("mimir-fast x", lambda: (_ for _ in ()).throw(RuntimeError("bug")), "")


@pytest.mark.parametrize(
    ("theirs", "spins"), [({}, cli.SPINS), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "active"}, None)]
)
def test_waiting_threads_sleep_early_unless_the_user_says_otherwise(monkeypatch, theirs, spins):
    """Before the verb is imported, and torch with it, which reads the variables."""
    environment, seen = dict(theirs), []

    def imported(name):
        seen.append(environment.get("GOMP_SPINCOUNT"))
        return SimpleNamespace(main=lambda words: 0)

    monkeypatch.setattr(cli.os, "environ", environment)
    monkeypatch.setattr(cli.importlib, "import_module", imported)
    assert cli.run_verb("report", []) == 0
    assert seen == [spins]
