"""python -m bench gpu: the plan, stages that fail or take too long, the summary, what it refuses, the simulated GPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench import data, gpu, profile, train
from bench.__main__ import main
from bench.gpu import FLAGS, Outcome, Stage, plan
from bench.kernels import command as kernels
from bench.records import ROOT
from bench.step import command as step
from bench.steps import FINETUNE, PRETRAIN, asked
from mimir_fast.cli.tune import parse_tune_args
from tests.support.simulation import needs_simulated_gpu

PARSERS = {"step": step.build_parser(), "train": train.build_parser(), "profile": profile.build_parser()}
PARSERS |= {"kernels": kernels.build_parser(), "data": data.build_parser()}


def script(text: str) -> list[str]:
    return [sys.executable, "-c", text]


def test_the_plan_is_made_of_commands_that_parse():
    args = gpu.build_parser().parse_args("--data_root images --output out --results res".split())
    args.output, args.results = Path(args.output), Path(args.results)
    first, second, capture, tests, *found = plan(args, ["--mask_ratio", "0.6"])
    for stage, model in zip((first, second), ("mae_vit_base", "mae_vit_small"), strict=True):
        asked_for = parse_tune_args([*stage.command[4:], "--device", "cpu", "--precision", "bf16"])[0].config
        assert (stage.command[2:4], stage.name) == (["mimir_fast.cli", "tune"], f"tune {model}")
        assert (asked_for.model.model, asked_for.model.mask_ratio) == (model, 0.6)
    assert capture.command[3:] == ["capture", "--model", "mae_vit_small", "--mask_ratio", "0.6"]
    assert all((ROOT / word).exists() for word in tests.command if word.startswith("tests/"))
    steps = [f"step mae_vit_{m} {v}" for m in ("base", "small") for v in ("ours", "references", "textbook")]
    tuned = ["finetune vit_base PGD-1", "finetune vit_base PGD-10"]
    assert [s.name for s in found] == ["kernels", *steps, *tuned, "data", "train", "profile"]
    for stage in found:
        _, _, bench, verb, *words = stage.command
        own, flags = PARSERS[verb].parse_known_args(words)
        assert bench == "bench"
        assert verb == "profile" or own.results == f"res/{verb}.jsonl"
        if verb in ("kernels", "data"):
            continue
        config = asked(own.task, ["--device", "cpu", "--precision", "bf16", *flags]).config.flat()
        group, model, *how = stage.name.split() if verb == "step" else (verb, "mae_vit_base")
        assert config["model"] == model
        if group == "finetune":
            assert (own.task, f"PGD-{config['steps']}", config["residual_dtype"]) == (FINETUNE, *how, "bf16")
        else:
            assert (own.task, config["mask_ratio"], how) == (PRETRAIN, 0.6, [own.variant] if how else [])
    others = gpu.build_parser().parse_args(["--only", "step", "--models", "mae_convit_ti"])
    others.output, others.results = args.output, args.results
    assert [s.name for s in plan(others, FLAGS)] == [f"step mae_convit_ti {v}" for v in ("ours", "references")]
    only = gpu.build_parser().parse_args(["--only", "train,kernels"])
    only.output, only.results = args.output, args.results
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


def gone(pid: int) -> bool:
    """Whether a process has ended; where nobody collects orphans it stays in the table as a zombie."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] == "Z"


@pytest.mark.slow
def test_a_stage_that_fails_or_takes_too_long_does_not_stop_the_rest(go, tmp_path, capsys):
    grandchild = (
        "import subprocess,sys,time; c=subprocess.Popen([sys.executable,'-c','import time; time.sleep(600)']); "
    )
    grandchild += "print(c.pid, flush=True); time.sleep(600)"
    status, summary = go(
        Stage("fails", script("print('why'); raise SystemExit(3)"), 1000),
        Stage("hangs", script(grandchild), 4),
        Stage("kernels", script("import sys; print('50%|##  |', '\\nresult', *sys.argv[1:])"), 1000),
        minutes=20,
    )
    assert status == 1
    assert "[2/3] hangs: over time" in (printed := capsys.readouterr().out)
    assert summary in printed
    rows = [line.split(" | ")[:2] for line in summary.splitlines() if line.startswith("| ")][2:]
    assert rows == [["| fails", "failed"], ["| hangs", "over time"], ["| kernels", "ok"]]
    assert summary.startswith("# NVIDIA H100, commit ")
    assert "3 of 3 stages done; NOT ok: fails, hangs." in summary
    assert "## fails: failed\n\n```\nwhy\n```" in summary
    assert "\nresult --seconds " in summary  # kernels are told how long they may take
    assert "50%" not in summary
    assert gone(int((tmp_path / "out" / "02-hangs.log").read_text()))  # what the stage had started
    assert go(Stage("works", script(""), 1))[0] == 0


def test_what_a_stage_leaves_over_goes_to_the_next(go, monkeypatch):
    clock, limits = [0.0], []

    def instant(stage, limit, log):
        limits.append(limit)
        clock[0] += {"a": 10, "b": 60, "c": 0}[stage.name]
        return Outcome(stage.name, "ok", 0, limit, [])

    monkeypatch.setattr(gpu.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(gpu, "run_one", instant)
    go(*(Stage(name, [], share) for name, share in (("a", 1), ("b", 2), ("c", 1))), minutes=100 / 60)
    assert limits == pytest.approx([25, 60, 30])


def test_ctrl_c_ends_the_stage_and_keeps_what_was_done(go, monkeypatch, capsys):
    waited, processes = subprocess.Popen.wait, []

    def wait(process, timeout=None):
        if process.args[-1] == "import time; time.sleep(600)" and process not in processes:
            processes.append(process)
            raise KeyboardInterrupt
        return waited(process, timeout)

    monkeypatch.setattr(subprocess.Popen, "wait", wait)
    status, summary = go(Stage("works", script(""), 1), Stage("long", script("import time; time.sleep(600)"), 1))
    assert status == 130
    assert "stopped; what was done is in" in capsys.readouterr().err
    assert processes[0].returncode is not None
    assert "| works | ok |" in summary


@needs_simulated_gpu
def test_on_a_simulated_gpu(tmp_path, capfd):
    size, out = "--models mae_vit_nano --batch_size 2 --input_size 32 --patch_size 8 --no_compile", tmp_path / "out"
    command = f"gpu --simulate h100 --only tests,profile {size} --output {out} --results {tmp_path} --minutes 5"
    assert main(command.split()) == 0, capfd.readouterr()
    summary = (tmp_path / "out" / "summary.md").read_text()
    assert summary.startswith("# simulated-h100, commit ")
    assert "nothing here is a measured time" in summary
    assert "| profile | ok |" in summary
    assert (tmp_path / "out" / "profile" / "trace.json.gz").exists()
