"""python -m bench profile: a trace of a small run on the CPU, NVTX ranges, commands to paste."""

import gzip
import json
import shlex
from collections import Counter
from contextlib import contextmanager
from types import SimpleNamespace

import torch

from bench import profile
from bench.__main__ import main
from mimir_fast.training.stages import STAGES
from tests.support.runs import make_images

SMALL = "profile --model mae_vit_ti --batch 4 --input_size 16 --patch_size 8 --warmup 1 --updates 2".split()
ON_CPU = "-- --device cpu --num_workers 0".split()
CPU, CUDA = torch.autograd.DeviceType.CPU, torch.autograd.DeviceType.CUDA


def test_a_trace_of_the_observed_updates(tmp_path, capsys):
    words = ["--data_root", str(make_images(tmp_path / "data")), "--output", str(tmp_path / "out")]
    assert main([*SMALL, *words, *ON_CPU]) == 0
    with gzip.open(tmp_path / "out" / "trace.json.gz", "rt") as file:
        events = json.load(file)["traceEvents"]
    ranges = Counter(e["name"] for e in events if e.get("cat") == "user_annotation" and e["name"] in STAGES)
    assert ranges == {**dict.fromkeys(STAGES, 2), "loss": 4}  # the attack's and the training's
    printed = capsys.readouterr().out
    assert "2 updates after 1 of mae_vit_ti, batch 4; cpu" in printed
    rows = printed.partition("the 10 most expensive operations on the host of ")[2].splitlines()[1:11]
    assert all(float(row.split()[1]) > 0 for row in rows)
    names = {row.split(maxsplit=3)[3] for row in rows}
    assert any("aten::" in name for name in names)
    assert not names & set(STAGES)


def test_ranges_only_names_every_stage_and_the_profilers_see_the_observed_updates(tmp_path, monkeypatch, capsys):
    happened = []

    @contextmanager
    def ranged(name):
        happened.append(name)
        yield
        happened.append("end")

    signals = [lambda word=word: happened.append(word) for word in ("START", "STOP")]
    ranges = profile.Profiler(ranged, *signals, lambda: ["NVTX ranges only"])
    monkeypatch.setattr(profile, "nvtx_ranges", lambda: ranges)
    assert main([*SMALL, "--ranges_only", "--data_root", str(make_images(tmp_path)), *ON_CPU]) == 0
    update = "data prepare attack loss encoder penalty decoder loss backward optimizer".split()
    assert [word for word in happened if word != "end"] == [*update, "START", *update, *update, "STOP"]
    before = happened[: happened.index("START")]
    assert before.count("end") == len(update)  # no range is open where the profiler starts
    assert "NVTX ranges only" in capsys.readouterr().out


def test_ranges_are_nvtxs_and_need_a_gpu(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["profile", "--ranges_only"]) == 2
    assert "ranges_only: no CUDA device here" in capsys.readouterr().err
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    found = profile.nvtx_ranges()
    expected = (torch.cuda.nvtx.range, torch.cuda.profiler.start, torch.cuda.profiler.stop)
    assert (found.opened, found.start, found.stop) == expected


def row(key, us, device=CPU, annotation=False, count=1):
    times = {"self_cpu_time_total": us * (device == CPU), "self_device_time_total": us * (device == CUDA)}
    return SimpleNamespace(key=key, count=count, device_type=device, is_user_annotation=annotation, **times)


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
    own = ["--batch", "64", "--task", "finetune", "--model", "vit_ti", "--data_root", str(tmp_path / "a b")]
    args = profile.build_parser().parse_args([*own, "--output", "out"])
    nsys, ncu = (shlex.split(line) for line in profile.commands(args, ["--num_workers", "8"]) if line.startswith("  "))
    for words, tool, updates in ((nsys, "nsys", 3), (ncu, "ncu", 1)):
        at = words.index("bench")
        assert (words[0], words[at - 2 : at + 2]) == (tool, ["python", "-m", "bench", "profile"])
        again = profile.build_parser().parse_args(words[at + 2 : words.index("--")])
        assert vars(again) == vars(args) | {"ranges_only": True, "updates": updates}
        assert words[words.index("--") + 1 :] == ["--num_workers", "8"]
    assert {"--capture-range=cudaProfilerApi", "--output=out/nsys"} <= set(nsys)
    assert ncu[ncu.index("--nvtx-include") + 1] == "attack/"  # the slash: a range that is pushed and popped
    assert ncu[ncu.index("--profile-from-start") + 1] == "off"
