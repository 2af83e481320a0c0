"""python -m bench gpu: the plan, stages that fail or take too long, the summary, what it refuses."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench import profile, train
from bench.__main__ import main
from bench.gpu import command, stages
from bench.gpu.plan import FLAGS, GROUPS, Stage, plan
from bench.gpu.stages import Outcome, run_all
from bench.gpu.summary import page
from bench.kernels import command as kernels
from bench.records import partition
from bench.step import command as step

ROOT = Path(__file__).parents[2]
MACHINE = {"device": "GPU", "commit": "abc", "date": "today", "torch": "2", "triton": "3"}


def planned(words: str = "", flags: tuple[str, ...] = ("--residual_dtype", "bf16")) -> list[Stage]:
    return plan(command.build_parser().parse_args(words.split()), list(flags))


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
    found = planned("--batch 64 --data_root images --output out --results res")
    variants = ("ours", "references", "textbook")
    steps = [f"step {model} {variant}" for model in ("mae_vit_base", "mae_vit_small") for variant in variants]
    steps += ["finetune vit_base PGD-1", "finetune vit_base PGD-10"]
    assert [s.name for s in found] == ["tests", "peaks", "kernels", *steps, "train", "profile"]
    assert list(dict.fromkeys(s.group for s in found)) == list(GROUPS)
    parsers = {"step": step.build_parser(), "train": train.build_parser(), "profile": profile.build_parser()}
    for stage in found:
        if stage.group == "finetune":
            own, flags = partition(stage.command[4:])
            args = parsers["step"].parse_args(own)
            assert stage.name == f"finetune {args.model} PGD-{args.steps}"
            assert (args.task, args.batch, args.results, flags) == ("finetune", 32, "res/step.jsonl", FLAGS)
        if stage.group not in parsers:
            continue
        assert stage.command[:4] == [sys.executable, "-m", "bench", stage.group]
        own, flags = partition(stage.command[4:])
        args = parsers[stage.group].parse_args(own)
        assert (args.batch, flags[-2:]) == (64, ["--residual_dtype", "bf16"])
        if stage.group == "step":
            assert stage.name == f"step {args.model} {args.variant}"
            assert (args.results, args.pretend) == ("res/step.jsonl", None)
        else:
            assert (args.data_root, args.model) == ("images", "mae_vit_base")
    assert all((ROOT / word).exists() for word in found[0].command if word.startswith("tests/"))
    assert not any(s.why for s in found)


def test_the_plan_on_a_pretend_gpu():
    found = {s.group: s for s in planned("--pretend wrapper --models mae_vit_ti --output out")}
    assert "computes nothing" in found["tests"].why
    for name in ("peaks", "kernels", "train", "profile"):
        assert found[name].command[0] == str(Path("wrapper").resolve())
        assert found[name].command[1:6:2] == ["--arch", "--mem-mb", "--log"]
        assert found[name].command[7] == sys.executable
    assert found["step"].command[-4:] == ["--pretend", "wrapper", "--", *"--residual_dtype bf16".split()][-4:]
    assert [s.name for s in planned("--only train,peaks")] == ["peaks", "train"]


def test_a_stage_that_fails_or_takes_too_long_does_not_stop_the_rest(tmp_path):
    results = tmp_path / "records.jsonl"
    results.write_text('{"old": 1}\n')
    grandchild = (
        "import subprocess,sys,time; c=subprocess.Popen([sys.executable,'-c','import time; time.sleep(600)']); "
    )
    grandchild += "print(c.pid, flush=True); time.sleep(600)"
    todo = [
        Stage("fails", "x", script("print('before'); raise SystemExit(3)"), 1000),
        Stage("hangs", "x", script(grandchild), 2),
        Stage("not here", "x", script(""), 1, why="no reason"),
        Stage("works", "x", script(f"open({str(results)!r}, 'a').write('{{\"new\": 2}}\\n')"), 1000, results),
    ]
    reported = []
    outcomes = run_all(todo, 2000, tmp_path / "out", lambda done: reported.append([o.status for o in done]))
    assert reported[-1] == ["failed", "over time", "skipped", "ok"]
    assert [len(statuses) for statuses in reported] == [1, 2, 3, 4]
    assert outcomes[0].tail == ["before"]
    assert outcomes[0].log.read_text() == "before\n"
    assert outcomes[3].records == [{"new": 2}]
    assert gone(int(outcomes[1].tail[0]))  # what the stage had started


def test_a_stage_is_told_how_long_it_may_take(tmp_path):
    words = script("import sys; print(*sys.argv[1:])")
    (outcome,) = run_all([Stage("knows", "x", words, 1, told=True)], 100, tmp_path, lambda done: None)
    assert outcome.tail == ["--seconds 80"]
    (stage,) = [stage for stage in planned("--results res") if stage.told]
    assert (stage.name, stage.command[4:6]) == ("kernels", ["--device", "cuda"])
    args = kernels.build_parser().parse_args([*stage.command[4:], "--seconds", "85"])
    assert (args.seconds, args.results) == (85, "res/kernels.jsonl")


def test_what_a_stage_leaves_over_goes_to_the_next(tmp_path, monkeypatch):
    clock, limits = [0.0], []

    def instant(stage, limit, log):
        limits.append(limit)
        clock[0] += {"a": 10, "b": 60, "c": 0}[stage.name]
        return Outcome(stage, "ok")

    monkeypatch.setattr(stages.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(stages, "run_one", instant)
    todo = [Stage(name, name, [], share) for name, share in (("a", 1), ("b", 2), ("c", 1))]
    run_all(todo, 100, tmp_path, lambda done: None)
    assert limits == pytest.approx([25, 60, 30])


def record_of_a_step(ms: float | None) -> dict:
    measured = None if ms is None else {"ms": ms, "images_per_s": 1e4, "mfu": 0.5, "share_of_bound": 0.75}
    totals = {"bound_ms": 39.4, "launches": 719, "peak_gib": 10.1}
    return {
        "device": "NVIDIA H100",
        "config": {"model": "mae_vit_base"},
        "variant": "ours",
        "measured": measured,
        "totals": totals,
    }


def test_the_summary(tmp_path):
    stage = {name: Stage(name, name.split()[0], [], 1) for name in ("step b ours", "profile", "kernels", "tests")}
    log = tmp_path / "03-kernels.log"
    outcomes = [
        Outcome(stage["step b ours"], "ok", 31.0, 60.0, records=[record_of_a_step(52.5)]),
        Outcome(stage["profile"], "ok", 9.0, 10.0, tail=["50%|##  | 1/2 [1.09s/step]", "most expensive"]),
        Outcome(stage["kernels"], "over time", 75.0, 75.0, log, tail=["last words"]),
    ]
    text = page(outcomes, 4, MACHINE)
    assert text.startswith("# NVIDIA H100, commit abc\n")
    assert "3 of 4 stages done; NOT ok: kernels." in text
    assert "| mae_vit_base | ours | 52.5 | 10000 | 0.500 | 39.4 | 0.750 | 719 | 10.1 |" in text
    assert "| kernels | over time | 75 | 75 | 03-kernels.log |" in text
    assert "most expensive" in text
    assert "s/step" not in text
    assert text.index("## kernels: over time") < text.index("last words")
    tuning = record_of_a_step(450.0) | {"task": "finetune"}
    tuning["config"] = {"model": "vit_base", "attack_train": "pgd", "steps": 10}
    text = page([Outcome(Stage("finetune b PGD-10", "finetune", [], 1), "ok", records=[tuning])], 1, MACHINE)
    assert "| vit_base | ours, PGD-10 | 450.0 |" in text
    text = page([Outcome(stage["step b ours"], "ok", records=[record_of_a_step(None)])], 1, MACHINE)
    assert "1 of 1 stages done." in text
    assert "| mae_vit_base | ours | - | - | - | 39.4 | - | 719 | 10.1 |" in text


def test_the_command_reports_and_its_status_tells(tmp_path, monkeypatch, capsys):
    todo = [Stage("fails", "x", script("print('why'); raise SystemExit(3)"), 1), Stage("works", "x", script(""), 1)]
    monkeypatch.setattr(command, "plan", lambda args, flags: todo)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    words = ["gpu", "--output", str(tmp_path / "out"), "--results", str(tmp_path)]
    assert main(words) == 1
    printed, summary = capsys.readouterr().out, (tmp_path / "out" / "summary.md").read_text()
    assert "[1/2] fails: failed" in printed
    assert "[2/2] works: ok" in printed
    assert summary in printed
    assert "| fails | failed |" in summary
    assert "why" in summary
    todo.pop(0)
    assert main(words) == 0


def test_ctrl_c_ends_the_stage_and_keeps_what_was_done(tmp_path, monkeypatch, capsys):
    waited = subprocess.Popen.wait
    processes = []

    def wait(process, timeout=None):
        if process.args[-1] == "import time; time.sleep(600)" and process not in processes:
            processes.append(process)
            raise KeyboardInterrupt
        return waited(process, timeout)

    monkeypatch.setattr(subprocess.Popen, "wait", wait)
    todo = [Stage("works", "x", script(""), 1), Stage("long", "x", script("import time; time.sleep(600)"), 1)]
    monkeypatch.setattr(command, "plan", lambda args, flags: todo)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert main(["gpu", "--output", str(tmp_path), "--results", str(tmp_path)]) == 130
    assert "stopped; what was done is in" in capsys.readouterr().err
    assert processes[0].returncode is not None
    assert "| works | ok |" in (tmp_path / "summary.md").read_text()


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (
            "--only tests,nothing",
            "only: expected some of tests, peaks, kernels, step, finetune, train, profile, got nothing",
        ),
        ("--minutes 0", "minutes: expected more than 0, got 0"),
        ("--pretend /no/such/wrapper", "pretend: no file /no/such/wrapper"),
    ],
)
def test_wrong_arguments(words, complaint, capsys):
    assert main(["gpu", *words.split()]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert complaint in line


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is here")
def test_without_a_gpu_one_line(capsys, tmp_path):
    assert main(["gpu", "--output", str(tmp_path / "out")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "device: no CUDA device here" in line
    assert not (tmp_path / "out").exists()
