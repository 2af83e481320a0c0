"""python -m bench kernels: which cases, what is right, what is timed and recorded, what a crash costs."""

import json
import subprocess
import sys

import pytest
import torch

from bench.__main__ import main
from bench.kernels import bench_linf_patch_step, bench_linf_start, bench_nhsic, command
from bench.kernels.case import Case, Drawn
from bench.kernels.suite import OPS, SIZES, Size, entries
from bench.kernels.work import figures, work
from bench.peaks import PEAKS
from tests.support.budget import beyond_budget
from tests.support.simulation import needs_simulated_gpu

CPU = torch.device("cpu")
TINY = Size(B=2, side=8, p=4, L=4, K=1, M=3, P=48, D=64, N=2, E=64, R=4)


# ---- which cases, and their bytes and FLOPs by hand


def test_recipes_of_one_shape_share_a_case_and_the_usual_dtype_comes_first():
    found = entries(["linf_start", "mlp"], ["imagenet_vit_s", "imagenet_vit_b", "cifar10_vit_s"], ["bf16", "fp32"])
    assert [(e.case.op, e.case.dtype, e.recipes) for e in found[:4]] == [
        ("mlp", "bf16", ("imagenet_vit_s",)),  # encoder
        ("mlp", "bf16", ("imagenet_vit_s", "imagenet_vit_b")),  # decoder
        ("linf_start", "fp32", ("imagenet_vit_s", "imagenet_vit_b")),
        ("mlp", "bf16", ("imagenet_vit_b",)),
    ]
    assert found[0].case.shape == {"B": 512, "T": 50, "D": 384, "F": 1536}
    cifar = next(e.case for e in found if e.recipes == ("cifar10_vit_s",) and e.case.part == "decoder")
    assert cifar.shape == {"B": 128, "T": 257, "D": 128, "F": 512}


def test_work_counted_by_hand(monkeypatch):
    monkeypatch.setitem(SIZES, "small", TINY)

    def counted(op: str, dtype: str, part: str = "") -> dict[str, tuple[float, dict]]:
        case = next(e.case for e in entries([op], ["small"], [dtype]) if e.case.part == part)
        named = {direction: figures(prices, PEAKS["h100"]) for direction, prices in work(case).items()}
        return {direction: (f["GB"] * 1e9, f["TFLOP"] * 1e12, f["bound ms"]) for direction, f in named.items()}

    count = 4 * 8 + 2 * 8 * 8
    assert counted("mask_indices", "fp32") == {"forward": pytest.approx((count, 0, count / 3.35e9))}
    out, flops = 2 * 5 * 64 * 2, 2 * 5 * 5 * 64  # decoder: two images of 1+4 tokens, 64 numbers of two bytes
    found = counted("short_attention", "bf16", "decoder")
    expected = {"forward": (4, 4), "backward": (7, 10), "both": (11, 14)}
    assert found == {d: pytest.approx((b * out, f * flops, b * out / 3.35e9)) for d, (b, f) in expected.items()}
    found = counted("mlp", "bf16", "encoder")  # 4 rows of 64, 256 hidden; all of its products count
    products = {"forward": 2, "backward": 4, "both": 6}
    assert {d: f[1] for d, f in found.items()} == {d: pytest.approx(n * 2 * 4 * 64 * 256) for d, n in products.items()}
    assert counted("mlp", "fp32", "encoder") == {}  # not offered
    assert figures([], None) == {"GB": 0, "TFLOP": 0, "bound ms": None}


# ---- right or wrong


def test_wrong_values_gradients_shapes_and_dtypes_are_seen():
    def wrong_gradient(x):
        return x.square().detach() + 2.002 * (x * x.detach() - x.detach() * x.detach())

    case = Case(
        "square", {"n": 6}, "fp32", lambda device: {"x": torch.randn(6).requires_grad_()}, lambda x, impl: x * x
    )
    drawn = Drawn(case, CPU)
    wrong = {
        "right": (torch.square, ""),
        "value": (lambda x: x.square() * 1.001, "output 0: off by"),
        "gradient": (wrong_gradient, "gradient of x: off by"),
        "nan": (lambda x: x.square() * torch.nan, "output 0: off by nan"),
        "dtype": (lambda x: x.double() ** 2, "output 0: torch.float64, expected torch.float32"),
    }
    for name, (function, why) in wrong.items():
        assert drawn.wrong(name, function).startswith(why), name
        assert bool(drawn.wrong(name, function)) == bool(why), name
    flat = Drawn(Case("square", {}, "fp32", lambda device: {"x": torch.randn(6)}, lambda x, impl: x * x), CPU)
    assert "shape (1,)" in flat.wrong("short", lambda x: x[:1].square())


def test_the_budget_sees_the_worst_element_and_the_mean():
    truth = torch.linspace(1, 2, 1000, dtype=torch.float64)
    eager, one, everywhere = (truth.float() for _ in range(3))
    eager[0] += 1e-4
    one[7] += 1e-3
    everywhere += 1.5e-4
    assert beyond_budget(eager, eager, truth) == ""
    assert "at worst" in beyond_budget(one, eager, truth)
    assert "in the mean" in beyond_budget(everywhere, eager, truth)


def test_judges_of_their_own():
    truth = torch.rand(4000, dtype=torch.float64)
    value = truth.float()
    value[:3] += 0.03
    assert bench_linf_patch_step.few_signs_flipped(value, value, truth) == ""
    value[3:9] += 0.03
    assert "pixels are wrong" in bench_linf_patch_step.few_signs_flipped(value, value, truth)
    images, eps = torch.rand(40000), bench_linf_start.EPS
    noise = eps * (2 * torch.rand(40000) - 1)
    assert bench_linf_start.moments((images + noise).clamp(0, 1), images) == ""
    assert "mean" in bench_linf_start.moments((images + noise.abs()).clamp(0, 1), images)
    assert "ball" in bench_linf_start.moments((images + 1.2 * noise).clamp(0, 1), images)
    assert "ball" in bench_linf_start.moments(torch.full_like(images, torch.nan), images)
    (case,) = bench_nhsic.cases(TINY, "fp32")
    assert case.judge(truth * 1.001, truth, truth) == ""
    assert "relative" in case.judge(truth * 1.003, truth, truth)


# ---- the command


@pytest.mark.slow
def test_every_operation_runs_on_a_cpu(tmp_path, capfd):
    """Checked and timed, eager and the rivals; compiled for one of them."""
    file, words = tmp_path / "kernels.jsonl", "not compiled or (compiled and mask_indices)"
    assert main(["kernels", "--results", str(file), "--", "-k", words]) == 0
    found = [json.loads(line) for line in file.read_text().splitlines()]
    assert {r["op"] for r in found} == set(OPS)
    assert {r["impl"] for r in found} == {"eager", "compiled", "cdist", "torch noise"}
    for r in found:
        assert [r[name] for name in ("kind", "device", "dtype", "status")] == ["kernels", "cpu", "fp32", "ok"]
        assert r["recipe"] in ("small", "small encoder", "small decoder")
        assert 0 < r["ms_p20"] <= r["ms"] <= r["ms_p80"]
        if r["op"] != "mlp":  # not offered in fp32: no contract
            assert r["GB"] > 0
    directions = {op: {r["direction"] for r in found if r["op"] == op} for op in ("mask_indices", "nhsic")}
    assert directions == {"mask_indices": {"forward"}, "nhsic": {"forward", "backward", "both"}}
    assert f"{len(found)} records in {file}" in capfd.readouterr().out


@needs_simulated_gpu
def test_our_kernels_run_on_a_simulated_gpu(tmp_path):
    """Forward and backward, compared with nothing and timed by nobody."""
    file = tmp_path / "kernels.jsonl"
    words = f"kernels short_attention mask_indices --recipes small --dtypes bf16 --simulate h100 --results {file}"
    assert main([*words.split(), "--", "-k", "ours"]) == 0
    found = [json.loads(line) for line in file.read_text().splitlines()]
    assert {(r["device"], r["impl"], r["status"], r["ms"]) for r in found} == {
        ("simulated-h100", "ours", "simulated", None)
    }
    assert [(r["op"], r["direction"]) for r in found if r["recipe"] != "small decoder"] == [
        *(("short_attention", direction) for direction in ("forward", "backward", "both")),
        ("mask_indices", "forward"),
    ]


def script(body: str) -> list[str]:
    """A stand-in for pytest: `words` has its options, `number` counts the measurements from --first on."""
    start = "import os, sys, time\nwords = dict(word[2:].split('=') for word in sys.argv[1:])\n"
    start += "for number in range(int(words['first']), 4):\n    open(words['progress'], 'w').write(str(number))\n"
    return [sys.executable, "-c", start + "\n".join(f"    {line}" for line in body.splitlines())]


def test_a_crash_costs_one_measurement(tmp_path, capfd):
    crashed, results = [], tmp_path / "k.jsonl"
    body = "print(number, flush=True)\nif number == 1: os.kill(os.getpid(), 9)\nif number == 2: os._exit(75)"
    assert command.supervise(script(body), None, lambda *how: crashed.append(how)) == 1
    assert capfd.readouterr().out.split() == ["0", "1", "2", "3"]
    assert crashed == [(1, -9), (2, 75)]
    assert command.supervise(script("sys.exit(1)"), None, print) == 1
    assert command.supervise([sys.executable, "-c", "raise SystemExit(9)"], None, print) == 1
    command.note_crash(results)(7, -9)
    row = json.loads(results.read_text())
    assert row["kind"] == "crash"
    assert "status -9 in measurement 7" in row["why"]


def test_what_there_is_no_time_for_is_left_out(capfd):
    assert command.supervise(script("if number == 2: time.sleep(60)"), 3.0, print) == 0
    assert "out of time in measurement 2" in capfd.readouterr().out


def test_verdicts_name_the_best_rival_and_what_is_wrong():
    row = {"op": "mlp", "dtype": "bf16", "config": {"B": 2}, "direction": "forward", "recipe": "small", "status": "ok"}
    row |= {"kind": "kernels"}
    rows = [row | {"impl": "ours", "ms": 2.0, "bound ms": 1.0}]
    rows += [row | {"impl": name, "ms": ms} for name, ms in (("eager", 8.0), ("compiled", 3.0))]
    rows += [
        row | {"impl": "other", "status": "wrong", "why": "off by 1"},
        {"kind": "peaks", "reached": {"copy GB/s": 12.3456}},
    ]
    assert list(command.verdicts(rows)) == [
        "mlp bf16 B2 forward: 2.0000 ms, 50% of the data sheet's peak; 1.50 x the speed of compiled (3.0000 ms)",
        "NOT ok: mlp bf16 small, other (forward): off by 1",
    ]


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        ("gelu", f"op: expected some of {', '.join(OPS)}; got gelu"),
        ("--recipes small,large", "recipes: expected some of imagenet_vit_b, "),
        ("--dtypes fp8", "dtypes: expected some of bf16, fp16, fp32; got fp8"),
        ("--seconds 0", "seconds: expected more than 0, got 0"),
    ],
)
def test_wrong_arguments_in_one_line(words, complaint, capsys):
    assert main(["kernels", *words.split()]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert complaint in line


def test_it_needs_pytest_benchmark(monkeypatch, capsys):
    monkeypatch.setattr(command, "find_spec", lambda name: None)
    assert main(["kernels"]) == 2
    assert "pytest-benchmark is not installed" in capsys.readouterr().err


@pytest.mark.slow
def test_a_wrong_rival_fails_its_test_and_is_on_record(tmp_path, monkeypatch):
    plugin = tmp_path / "spoiled.py"
    plugin.write_text(
        "from bench.kernels import bench_linf_start\nbench_linf_start.torch_noise = lambda **i: i['images_BCHW'] + 1\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    words = [
        sys.executable,
        "-m",
        "pytest",
        "bench/kernels",
        "--benchmark-only",
        "-p",
        "spoiled",
        "-p",
        "no:cacheprovider",
    ]
    words += ["--ops=linf_start", f"--results={tmp_path / 'k.jsonl'}", "-k", "not compiled"]
    done = subprocess.run(words, cwd=command.records.ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stdout
    found = [json.loads(line) for line in (tmp_path / "k.jsonl").read_text().splitlines()]
    assert {r["impl"]: (r["status"], r["ms"] is None) for r in found} == {
        "eager": ("ok", False),
        "torch noise": ("wrong", True),
    }
    assert "the ball has" in found[-1]["why"]
