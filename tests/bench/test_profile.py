"""python -m bench profile: a trace of a small run on the CPU, and the ranges for NVIDIA's profilers."""

import gzip
import json
import re
from collections import Counter
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

from bench import profile
from bench.__main__ import main
from mimir_fast.training.stages import STAGES
from tests.support.runs import make_images

SMALL = "profile --model mae_vit_nano --batch_size 4 --input_size 16 --patch_size 8 --warmup 1 --updates 2".split()
ON_CPU = "-- --device cpu --num_workers 0".split()


@pytest.mark.slow
def test_a_trace_of_the_observed_updates(tmp_path, capsys):
    words = ["--data_root", str(make_images(tmp_path / "data")), "--output", str(tmp_path / "out")]
    assert main([*SMALL, *words, *ON_CPU]) == 0
    with gzip.open(tmp_path / "out" / "trace.json.gz", "rt") as file:
        events = json.load(file)["traceEvents"]
    ranges = Counter(e["name"] for e in events if e.get("cat") == "user_annotation" and e["name"] in STAGES)
    # The loss of the attack and of the training; the penalty of the images and of what the encoder makes of them.
    assert ranges == {**dict.fromkeys(STAGES, 2), "loss": 4, "penalty": 4}
    printed = capsys.readouterr().out
    assert "2 updates after 1 of mae_vit_nano, batch 4; cpu" in printed
    assert all(float(re.search(rf"^{name} +([0-9.]+) ms$", printed, re.MULTILINE)[1]) > 0 for name in STAGES)
    assert 1 <= len(re.findall(r"^ *aten::", printed, re.MULTILINE)) <= 10


def test_nvidias_profilers_see_the_updates_after_the_warm_up(monkeypatch):
    happened = []

    @contextmanager
    def opened(name):
        happened.append(name)
        yield
        happened.append("end")

    monkeypatch.setattr(torch.cuda, "synchronize", lambda: happened.append("drained"))
    for word in ("start", "stop"):
        monkeypatch.setattr(torch.cuda.profiler, word, lambda word=word: happened.append(word.upper()))
    with profile.cuda_profiler(SimpleNamespace(warmup=1, updates=2)) as updated:
        stage = profile.counted(opened, updated)
        for name in ("data", "optimizer") * 3:
            with stage(name):
                pass
    update = ["data", "end", "optimizer", "end"]
    assert happened == [*update, "drained", "START", *update, *update, "drained", "STOP"]


def test_the_words_for_nvidias_profilers_parse():
    for words in re.findall(r"python -m bench profile (--ranges_only.*)", profile.EPILOG):
        assert profile.build_parser().parse_args(words.split()).ranges_only
