"""python -m bench gpu: the plan, stages that fail or take too long, the summary, what it refuses, the simulated GPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench import __main__, gpu, profile, train
from bench.__main__ import main
from bench.gpu import FLAGS, GROUPS, Outcome, Stage, page, plan
from bench.kernels import command as kernels
from bench.step import command as step
from tests.support.simulation import needs_simulated_gpu

HEADING = {"device": "NVIDIA H100", "commit": "abc", "date": "today", "torch": "2", "triton": "3"}
PARSERS = {
    name: m.build_parser() for name, m in (("step", step), ("train", train), ("profile", profile), ("kernels", kernels))
}


def script(text: str) -> list[str]:
    return [sys.executable, "-c", text]


def gone(pid: int) -> bool:
    """Whether a process has ended; where nobody collects orphans it stays in the table as a zombie."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] == "Z"


def test_the_plan_is_made_of_commands_that_parse():
    words = "--batch 64 --data_root images --output out --results res".split()
    found = plan(gpu.build_parser().parse_args(words), ["--residual_dtype", "bf16"])
    steps = [
        f"step {model} {v}" for model in ("mae_vit_base", "mae_vit_small") for v in ("ours", "references", "textbook")
    ]
    steps += ["finetune vit_base PGD-1", "finetune vit_base PGD-10"]
    assert [s.name for s in found] == ["tests", "kernels", *steps, "train", "profile"]
    assert list(dict.fromkeys(s.group for s in found)) == list(GROUPS)
    for stage in found[1:]:
        _, _, bench, verb, *words = stage.command
        where = words.index("--") if "--" in words else len(words)
        args, flags = PARSERS[verb].parse_args(words[:where]), words[where + 1 :]
        assert (bench, verb) == ("bench", {"finetune": "step"}.get(stage.group, stage.group))
        assert stage.file == (None if verb == "profile" else Path("res") / f"{verb}.jsonl")
        if stage.group == "step":
            assert (stage.name, args.batch, flags) == (f"step {args.model} {args.variant}", 64, FLAGS)
        elif stage.group == "finetune":
            assert stage.name == f"finetune {args.model} PGD-{args.steps}"
            assert (args.task, args.batch, flags) == ("finetune", 32, FLAGS)
        elif verb != "kernels":
            assert (args.data_root, args.model, flags[-2:]) == ("images", "mae_vit_base", FLAGS)
    assert all(
        (Path(__main__.__file__).parents[1] / word).exists() for word in found[0].command if word.startswith("tests/")
    )
    only = gpu.build_parser().parse_args(["--only", "train,kernels"])
    assert [s.name for s in plan(only, FLAGS)] == ["kernels", "train"]


@pytest.fixture
def go(tmp_path, monkeypatch):
    """Runs stages in place of the plan; gives the exit status and the summary."""

    def run(*stages: Stage, minutes: float = 1.0) -> tuple[int, str]:
        monkeypatch.setattr(gpu, "plan", lambda args, flags: list(stages))
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(gpu.records, "device_name", lambda device: "NVIDIA H100")
        status = main(f"gpu --minutes {minutes} --output {tmp_path / 'out'} --results {tmp_path}".split())
        return status, (tmp_path / "out" / "summary.md").read_text()

    return run


def test_a_stage_that_fails_or_takes_too_long_does_not_stop_the_rest(go, tmp_path, capsys):
    results = tmp_path / "records.jsonl"
    results.write_text('{"old": 1}\n')
    grandchild = (
        "import subprocess,sys,time; c=subprocess.Popen([sys.executable,'-c','import time; time.sleep(600)']); "
    )
    grandchild += "print(c.pid, flush=True); time.sleep(600)"
    write = f"import sys; open({str(results)!r}, 'a').write('{{\"new\": 2}}\\n'); print(*sys.argv[1:])"
    status, summary = go(
        Stage("fails", "x", script("print('why'); raise SystemExit(3)"), 1000),
        Stage("hangs", "x", script(grandchild), 4),
        Stage("not here", "x", script(""), 1, why="no reason"),
        Stage("works", "profile", script(write), 1000, results, told=True),
        minutes=20,
    )
    assert status == 1
    assert "[2/4] hangs: over time" in (printed := capsys.readouterr().out)
    assert summary in printed
    rows = [line.split(" | ")[:2] for line in summary.splitlines() if line.startswith("| ")][2:]
    expected = ["| fails", "failed"], ["| hangs", "over time"], ["| not here", "skipped (no reason)"], ["| works", "ok"]
    assert tuple(rows) == expected
    assert "4 of 4 stages done; NOT ok: fails, hangs." in summary
    assert "## fails: failed\n\n```\nwhy\n" in summary
    assert "--seconds " in summary.partition("## works")[2]  # a stage is told how long it may take
    assert gone(int((tmp_path / "out" / "02-hangs.log").read_text()))  # what the stage had started
    assert go(Stage("works", "x", script(""), 1))[0] == 0


def test_what_a_stage_leaves_over_goes_to_the_next(go, monkeypatch):
    clock, limits = [0.0], []

    def instant(stage, limit, log):
        limits.append(limit)
        clock[0] += {"a": 10, "b": 60, "c": 0}[stage.name]
        return Outcome(stage, "ok")

    monkeypatch.setattr(gpu.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(gpu, "run_one", instant)
    go(*(Stage(name, name, [], share) for name, share in (("a", 1), ("b", 2), ("c", 1))), minutes=100 / 60)
    assert limits == pytest.approx([25, 60, 30])


def test_ctrl_c_ends_the_stage_and_keeps_what_was_done(go, monkeypatch, capsys):
    waited, processes = subprocess.Popen.wait, []

    def wait(process, timeout=None):
        if process.args[-1] == "import time; time.sleep(600)" and process not in processes:
            processes.append(process)
            raise KeyboardInterrupt
        return waited(process, timeout)

    monkeypatch.setattr(subprocess.Popen, "wait", wait)
    status, summary = go(
        Stage("works", "x", script(""), 1), Stage("long", "x", script("import time; time.sleep(600)"), 1)
    )
    assert status == 130
    assert "stopped; what was done is in" in capsys.readouterr().err
    assert processes[0].returncode is not None
    assert "| works | ok |" in summary


def record_of_a_step(ms: float | None, **fields) -> dict:
    measured = None if ms is None else {"ms": ms, "images_per_s": 1e4, "mfu": 0.5, "share_of_bound": 0.75}
    totals = {"bound_ms": 39.4, "launches": 719, "peak_gib": 10.1}
    what = {"task": "pretrain", "config": {"model": "mae_vit_base"}, "variant": "ours"}
    return {**what, "measured": measured, "totals": totals, **fields}


def test_the_summary():
    def stage(name: str) -> Stage:
        return Stage(name, name.split()[0], [], 1)

    tuned = {"task": "finetune", "config": {"model": "vit_base", "steps": 10}}
    outcomes = [
        Outcome(stage("step b ours"), "ok", 31.0, 60.0, [record_of_a_step(52.5), record_of_a_step(None)]),
        Outcome(stage("finetune b PGD-10"), "ok", found=[record_of_a_step(450.0, **tuned)]),
        Outcome(stage("profile"), "ok", 9.0, 10.0, tail=["50%|##  | 1/2 [1.09s/step]", "most expensive"]),
        Outcome(stage("kernels"), "over time", 75.0, 75.0, tail=["last words"]),
    ]
    text = "\n".join(page(outcomes, 5, HEADING))
    assert text.startswith("# NVIDIA H100, commit abc\n")
    assert "4 of 5 stages done; NOT ok: kernels." in text
    assert "| mae_vit_base | ours | 52.5 | 10000 | 0.500 | 39.4 | 0.750 | 719 | 10.1 |" in text
    assert "| mae_vit_base | ours | - | - | - | 39.4 | - | 719 | 10.1 |" in text
    assert "| vit_base | ours, PGD-10 | 450.0 |" in text
    assert "| kernels | over time | 75 | 75 |" in text
    assert "most expensive" in text
    assert "s/step" not in text
    assert text.index("## kernels: over time") < text.index("last words")
    simulated = "\n".join(page([], 1, HEADING | {"device": "simulated-h100"}))
    assert "nothing here is a measured time" in simulated


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        ("--only tests,nothing", f"only: expected some of {', '.join(GROUPS)}, got nothing"),
        ("--minutes 0", "minutes: expected more than 0, got 0"),
        ("", "device: no CUDA device here; --simulate h100 runs everything on a simulated one"),
    ],
)
def test_wrong_arguments(words, complaint, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["gpu", *words.split(), "--output", str(tmp_path / "out")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert complaint in line
    assert not (tmp_path / "out").exists()


@needs_simulated_gpu
def test_on_a_simulated_gpu(tmp_path, capfd):
    words = (
        f"--models mae_vit_ti --batch 2 --input_size 32 --patch_size 8 --output {tmp_path / 'out'} --results {tmp_path}"
    )
    command = f"gpu --simulate h100 --only tests,train {words} --minutes 5 -- --no_compile"
    assert main(command.split()) == 0, capfd.readouterr()
    summary = (tmp_path / "out" / "summary.md").read_text()
    assert summary.startswith("# simulated-h100, commit ")
    assert "| tests | skipped (a simulated GPU computes nothing) |" in summary
    assert "| train | ok |" in summary
    assert "a simulated GPU: no times; the run went through" in summary
