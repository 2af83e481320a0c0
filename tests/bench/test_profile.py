"""python -m bench profile: a trace of a small run on the CPU, NVTX ranges, commands to paste, what it refuses."""

import gzip
import json
import shlex
import sys
from collections import Counter
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

from bench import profile
from bench.__main__ import main
from bench.proton import kernel_times
from mimir_fast.training.stages import STAGES
from tests.support.runs import make_images

SMALL = "--model mae_vit_ti --batch 4 --input_size 16 --patch_size 8 --warmup 1".split()
ON_CPU = "-- --device cpu --num_workers 0".split()
CPU, CUDA = torch.autograd.DeviceType.CPU, torch.autograd.DeviceType.CUDA


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return str(make_images(tmp_path_factory.mktemp("data")))


def test_a_trace_of_the_observed_updates(data, tmp_path, capsys):
    words = [*SMALL, "--updates", "2", "--data_root", data, "--output", str(tmp_path / "out")]
    assert main(["profile", *words, *ON_CPU]) == 0
    with gzip.open(tmp_path / "out" / "trace.json.gz", "rt") as file:
        events = json.load(file)["traceEvents"]
    ranges = Counter(e["name"] for e in events if e.get("cat") == "user_annotation" and e["name"] in STAGES)
    assert ranges == {**dict.fromkeys(STAGES, 2), "loss": 4}  # the attack's and the training's
    printed = capsys.readouterr().out
    assert "2 updates after 1 of mae_vit_ti, batch 4; cpu" in printed
    head = "the 10 most expensive operations on the host of "
    rows = printed.partition(head)[2].splitlines()[1:11]
    assert all(float(row.split()[1]) > 0 for row in rows)
    assert any("aten::" in row for row in rows)
    names = {row.split(maxsplit=3)[3] for row in rows}
    assert not names & set(STAGES)
    assert "trace.json.gz" in printed


def test_ranges_only_names_every_stage_and_the_profiler_sees_the_observed_updates(data, monkeypatch, capsys):
    happened = []

    @contextmanager
    def annotate(message, domain):
        happened.append(f"{domain}@{message}")
        yield
        happened.append("end")

    monkeypatch.setitem(sys.modules, "nvtx", SimpleNamespace(annotate=annotate))
    ranges = profile.nvtx_ranges()._replace(
        start=lambda: happened.append("START"), stop=lambda: happened.append("STOP")
    )
    monkeypatch.setattr(profile, "nvtx_ranges", lambda: ranges)
    assert main(["profile", *SMALL, "--updates", "2", "--ranges_only", "--data_root", data, *ON_CPU]) == 0
    update = "data prepare attack loss encoder penalty decoder loss backward optimizer".split()
    opened = [word for word in happened if word != "end"]
    names = [f"mimir_fast@{name}" for name in update]
    assert opened == [*names, "START", *names, *names, "STOP"]
    before = happened[: happened.index("START")]
    assert before.count("end") == len(names)  # no range is open where the profiler starts
    assert "NVTX ranges only" in capsys.readouterr().out


def test_ranges_need_nvtx_and_the_trace_does_not(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "nvtx", None)
    assert main(["profile", "--ranges_only"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "pip install nvtx" in line
    assert profile.torch_profiler(None)


def test_on_a_gpu_ranges_come_with_the_profilers_signals(monkeypatch):
    monkeypatch.setitem(sys.modules, "nvtx", SimpleNamespace())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    found = profile.nvtx_ranges()
    assert (found.start, found.stop) == (torch.cuda.profiler.start, torch.cuda.profiler.stop)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is here")
def test_proton_refuses_without_a_gpu(tmp_path, capsys):
    assert main(["profile", "--proton", "--output", str(tmp_path / "out")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "proton: no CUDA device here" in line
    assert not (tmp_path / "out").exists()


def test_kernels_of_a_proton_tree():
    def leaf(name, ns, count):
        return {"frame": {"name": name}, "metrics": {"time (ns)": ns, "count": count}, "children": []}

    attack = {
        "frame": {"name": "attack"},
        "children": [leaf("mm", 4000, 2), {"frame": {"name": "loss"}}],
        "metrics": {},
    }
    attack["children"][1] |= {"metrics": {}, "children": [leaf("mm", 1000, 1), leaf("sum", 500, 1)]}
    root = {"frame": {"name": "ROOT"}, "metrics": {}, "children": [attack, leaf("mm", 7000, 1)]}
    assert kernel_times([root, {"CUDA": {"0": {}}}]) == {
        ("attack", "mm"): (3, 5.0),
        ("attack", "sum"): (1, 0.5),
        ("rest", "mm"): (1, 7.0),
    }


def row(key, us, device=CPU, annotation=False, count=1):
    return SimpleNamespace(
        key=key,
        count=count,
        device_type=device,
        is_user_annotation=annotation,
        self_cpu_time_total=us if device == CPU else 0.0,
        self_device_time_total=us if device == CUDA else 0.0,
    )


def test_the_most_expensive_kernels():
    rows = [row(f"kernel{n}", 100.0 + n, CUDA) for n in range(12)]
    rows += [row("attack", 9e9, CUDA, annotation=True), row("aten::mm", 9e9)]
    head, *found = profile.most_expensive(rows)
    assert head.startswith("the 10 most expensive kernels of 12 ")
    assert [line.split()[-1] for line in found] == [f"kernel{n}" for n in range(11, 1, -1)]
    assert found[0].split() == ["1", "0.111", f"{111 / 1266:.1%}", "kernel11"]
    head, first, *_ = profile.most_expensive([row("aten::mm", 3.0, count=5), row("attack", 9.0), row("aten::add", 1.0)])
    assert "2 most expensive operations" in head
    assert first.split() == ["5", "0.003", "75.0%", "aten::mm"]


def test_commands_to_paste_run_this_same_command(tmp_path):
    own = ["--proton", "--batch", "64", "--data_root", str(tmp_path / "a b"), "--output", "out"]
    lines = profile.commands(own, ["--num_workers", "8"], "out", on_gpu=True)
    nsys, ncu = (shlex.split(line) for line in lines if line.startswith("  "))
    for words, tool, updates in ((nsys, "nsys", 3), (ncu, "ncu", 1)):
        assert words[0] == tool
        after = words[words.index("profile", 3) + 1 :]
        assert words[words.index("profile", 3) - 3 : words.index("profile", 3)] == ["python", "-m", "bench"]
        args = profile.build_parser().parse_args(after[: after.index("--")])
        assert (args.ranges_only, args.proton, args.updates, args.batch) == (True, False, updates, 64)
        assert args.data_root == str(tmp_path / "a b")
        assert after[after.index("--") + 1 :] == ["--num_workers", "8"]
    assert {"--capture-range=cudaProfilerApi", "--output=out/nsys"} <= set(nsys)
    assert ncu[ncu.index("--nvtx-include") + 1] == "mimir_fast@attack/"  # the slash: a range that is pushed and popped
    assert ncu[ncu.index("--profile-from-start") + 1] == "off"
    assert all("ranges_only" not in line for line in profile.commands(own, [], "out", on_gpu=False))


def test_wrong_arguments(capsys):
    assert main(["profile", "--updates", "0"]) == 2
    assert "updates: expected 1 or more, got 0" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["profile", "--proton", "--ranges_only"])
