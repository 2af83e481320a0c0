"""python -m bench VERB: what is wrong is said in one line, with status 2, before anything is written."""

import pytest
import torch

from bench.__main__ import main
from bench.gpu import GROUPS
from bench.kernels.cases import OPS

ON_CPU = "-- --device cpu --num_workers 0"


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        ("kernels gelu", f"op: expected some of {', '.join(OPS)}; got gelu"),
        ("kernels --recipes small,large", "recipes: expected some of imagenet_vit_b, "),
        ("kernels --dtypes fp8", "dtypes: expected some of bf16, fp16, fp32; got fp8"),
        ("kernels --seconds 0", "seconds: expected more than 0, got 0"),
        ("step --batch_size 1", "device: no CUDA device here; --simulate h100 runs the step on a simulated one"),
        ("compile --batch_size 1", "--batch_size: not a flag of compile"),
        (f"train --batch_size 0 {ON_CPU}", "batch_size: "),
        (f"train --warmup 0 {ON_CPU}", "warmup: expected 1 or more, got 0"),
        (f"train --data_root /no/such/folder {ON_CPU}", "/no/such/folder: no such folder"),
        (f"train {ON_CPU} --mask_ratio 2", "mask_ratio: "),
        ("profile --ranges_only", "ranges_only: no CUDA device here"),
        ("data --steps 0", "steps: expected 1 or more, got 0"),
        ("data --workers 0", "workers: expected 1 or more, got 0"),
        ("data --speed 9", "--speed: no flag of python -m bench data"),
        ("gpu --only tests,nothing", f"only: expected some of {', '.join(GROUPS)}, got nothing"),
        ("gpu --minutes 0", "minutes: expected more than 0, got 0"),
        ("gpu", "device: no CUDA device here; --simulate h100 runs everything on a simulated one"),
    ],
)
def test_wrong_arguments(words, complaint, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.chdir(tmp_path)
    assert main(words.split()) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"python -m bench {words.split()[0]}: error: {complaint}")
    assert not list(tmp_path.iterdir())


def test_an_unknown_verb(capsys):
    assert main(["steps"]) == 2
    assert "usage: python -m bench {kernels,step,compile,train,data,profile,capture,gpu}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("where", "found", "words", "complaint"),
    [
        ("__main__.unsuitable", lambda: "simulated_gpu: held against", "step --simulate h100", "simulated_gpu: held"),
        ("kernels.command.find_spec", lambda name: None, "kernels", "kernels: pytest-benchmark is not installed"),
    ],
)
def test_what_is_not_there(where, found, words, complaint, monkeypatch, capsys):
    monkeypatch.setattr(f"bench.{where}", found)
    assert main(words.split()) == 2
    assert f"error: {complaint}" in capsys.readouterr().err
