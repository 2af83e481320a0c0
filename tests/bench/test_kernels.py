"""python -m bench kernels: who is timed how, who is refused, what is on record when things go wrong."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bench.__main__ import main
from bench.budget import beyond_budget
from bench.harness import FEWEST, LARGE, MOST, WallClock, interleaved, reached, sets_for, timed
from bench.kernels import bench_linf_patch_step, bench_linf_start, bench_nhsic, command, short, table
from bench.kernels.case import Case
from bench.kernels.cases import Setting, records
from bench.kernels.sizes import SIZES, Size
from bench.kernels.suite import OPS, Entry, entries
from bench.kernels.supervisor import CONTEXT_LOST, supervise
from bench.kernels.work import Work, work

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
TINY = Size(B=2, side=8, p=4, L=4, K=1, M=3, P=48, D=64, N=2, E=64, R=4)


class FakeClock:
    """A call takes as many milliseconds as the list says; calls are run."""

    def __init__(self, *milliseconds: float):
        self.milliseconds = milliseconds

    def times(self, calls):
        return [self.milliseconds[call()] for call in calls]


class FixedClock:
    """Every call takes as long."""

    def __init__(self, ms: float):
        self.ms = ms

    def times(self, calls):
        return [self.ms for call in calls if call() is not None]


class NoClock:
    def times(self, calls):
        raise AssertionError("nothing may be timed")


def setting(**more) -> Setting:
    known = {"reached": {"copy GB/s": 10.0}, "cache": 2**10, "seconds": 0.001, "impls": ("eager", "others")}
    return Setting(CPU, **{"clock": WallClock(), **known, **more})


def square(x, impl="reference"):
    if impl != "reference":
        raise RuntimeError("no kernel on a CPU")
    return x.square()


def squares(rivals=None, **more) -> Case:
    """x^2 of 6 numbers, differentiable; its contract is none of ours."""

    def draw(device):
        return {"x": torch.randn(6, device=device).requires_grad_()}

    return Case("square", {"n": 6}, "fp32", draw, square, rivals or {}, refused="not on a CPU", **more)


# ---- timing


def test_contenders_take_turns_and_inputs_rotate():
    calls = []

    def contender(name):
        return lambda number: calls.append((name, number)) or len(calls) - 1

    found = interleaved({name: contender(name) for name in "abc"}, 4, 3, FakeClock(*range(9)))
    assert [name for name, _ in calls] == list("abc" + "bca" + "cab")
    assert [number for _, number in calls] == [0, 1, 2, 3, 0, 1, 2, 3, 0]
    assert found == {"a": [0, 5, 7], "b": [1, 3, 8], "c": [2, 4, 6]}


@pytest.mark.parametrize(("seconds", "rounds"), [(0.0, FEWEST), (0.110, 10), (1e9, MOST)])
def test_median_percentiles_and_rounds(seconds, rounds):
    class Slower:
        def __init__(self):
            self.round = 0

        def times(self, calls):
            self.round += 1
            return [{"a": 1.0, "b": 10.0}[call()] * (self.round if self.round > 2 else 1) for call in calls]

    found = timed({name: lambda number, name=name: name for name in "ab"}, 2, seconds, Slower())
    steps = [float(n) for n in range(3, 3 + rounds)]  # the first two rounds are a trial
    assert found["a"]["rounds"] == found["b"]["rounds"] == rounds
    assert found["a"]["ms"] == pytest.approx((steps[0] + steps[-1]) / 2)
    assert found["a"]["ms_p20"] == pytest.approx(steps[0] + 0.2 * (rounds - 1))
    assert found["b"]["ms_p80"] == pytest.approx(10 * (steps[0] + 0.8 * (rounds - 1)))


def test_the_sets_are_larger_than_the_cache():
    assert sets_for(1e9, 50 * 2**20) == 2
    assert sets_for(2**20, 50 * 2**20) == 100
    assert sets_for(3 * 2**20, 50 * 2**20) * 3 >= 100
    assert sets_for(1, LARGE) == 256


def test_the_bound_is_the_slower_of_memory_and_arithmetic():
    reached = {"copy GB/s": 1000.0, "bf16 TFLOP/s": 500.0, "tf32 TFLOP/s": 250.0}
    assert Work(1e9, {}).bound_ms(reached) == pytest.approx(1.0)
    assert Work(1e6, {"bf16": 1e12, "tf32": 1e12}).bound_ms(reached) == pytest.approx(2.0 + 4.0)
    assert Work(1e9, {"fp16": 1.0}).bound_ms(reached) is None
    assert Work(1e9, {}).bound_ms({}) is None


# ---- bytes and FLOPs, by hand


def tiny(op: str, dtype: str, part: str = "") -> dict[str, Work]:
    (case,) = [e.case for e in entries([op], ["small"], [dtype]) if e.case.part == part]
    return work(case)


def test_work_of_index_tables(monkeypatch):
    monkeypatch.setitem(SIZES, "small", TINY)
    assert tiny("mask_indices", "fp32") == {"forward": Work(4 * 8 + 2 * 8 * 8, {})}


def test_work_of_attention(monkeypatch):
    monkeypatch.setitem(SIZES, "small", TINY)
    out, flops = 2 * 5 * 64 * 2, 2 * 5 * 5 * 64  # decoder: two images of 1+4 tokens, 64 numbers of two bytes
    found = tiny("short_attention", "bf16", "decoder")
    assert found["forward"] == Work(4 * out, {"bf16": 4 * flops})
    assert found["backward"] == Work(7 * out, {"bf16": 10 * flops})
    assert found["both"] == Work(11 * out, {"bf16": 14 * flops})


def test_work_of_an_mlp_counts_all_its_products(monkeypatch):
    monkeypatch.setitem(SIZES, "small", TINY)
    found = tiny("mlp", "bf16", "encoder")  # 4 rows of 64, 256 hidden
    assert found["forward"].flops == {"bf16": 2 * 2 * 4 * 64 * 256}
    assert found["backward"].flops == {"bf16": 4 * 2 * 4 * 64 * 256}
    assert tiny("mlp", "fp32", "encoder") == {}  # not offered


# ---- right or wrong


def test_a_wrong_rival_is_reported_and_not_timed():
    runs = []

    def wrong(x):
        runs.append("wrong")
        return x.square() * 1.001

    def wrong_gradient(x):
        runs.append("wrong gradient")
        return x.square().detach() + 2.002 * (x * x.detach() - x.detach() * x.detach())

    def right(x):
        runs.append("right")
        return x * x

    rivals = {"wrong": wrong, "wrong gradient": wrong_gradient, "right": right}
    found = {(r["impl"], r["direction"]): r for r in records(squares(rivals), setting())}
    assert {impl for impl, _ in found} == {"eager", *rivals}
    for (impl, direction), r in found.items():
        good = impl in ("eager", "right")
        assert (r["status"], r["ms"] is not None) == (("ok", True) if good else ("wrong", False)), (impl, direction)
    assert "output 0: off by" in found["wrong", "forward"]["why"]
    assert "gradient of x: off by" in found["wrong gradient", "both"]["why"]
    assert runs.count("wrong") == runs.count("wrong gradient") == 1
    assert runs.count("right") > FEWEST


def test_nan_and_another_shape_or_dtype_are_wrong():
    rivals = {
        "nan": lambda x: x.square() * torch.nan,
        "short": lambda x: x[:1].square(),
        "wide": lambda x: x.double() ** 2,
    }
    case = replace(squares(rivals), draw=lambda device: {"x": torch.randn(6, device=device)})
    found = {r["impl"]: r for r in records(case, setting())}
    assert len(found) == 4
    assert [found[name]["status"] for name in ("eager", *rivals)] == ["ok", "wrong", "wrong", "wrong"]
    assert "shape (1,)" in found["short"]["why"]
    assert "float64" in found["wide"]["why"]


def test_what_raises_is_reported_and_the_rest_continues():
    def raises(x):
        raise RuntimeError("out of\n  order")

    later = []

    def raises_when_timed(x):
        later.append(1)
        if len(later) > 4:
            raise RuntimeError("tired")
        return x.square()

    found = {r["impl"]: r for r in records(squares({"raises": raises, "fine": torch.square}), setting())}
    assert (found["raises"]["status"], found["raises"]["why"]) == ("failed", "RuntimeError: out of order")
    assert (found["eager"]["status"], found["fine"]["status"]) == ("ok", "ok")
    found = list(records(squares({"tires": raises_when_timed}), setting(directions=("forward",))))
    assert {(r["impl"], r["status"]) for r in found} == {("eager", "failed"), ("tires", "failed")}
    assert all("tired" in r["why"] for r in found)
    (bad,) = records(replace(squares(), draw=lambda device: 1 / 0), setting())
    assert (bad["status"], bad["impl"], bad["why"]) == ("failed", "all", "ZeroDivisionError: division by zero")


def test_a_pretend_gpu_compares_and_times_nothing():
    rivals = {"wrong": lambda x: 2 * x, "raises": lambda x: 1 / 0}
    found = list(records(squares(rivals), setting(pretend=True, clock=NoClock())))
    assert {(r["impl"], r["status"]) for r in found} == {
        ("eager", "pretend"),
        ("wrong", "pretend"),
        ("raises", "failed"),
    }
    assert all(r["ms"] is None and r["share of peak"] is None for r in found)


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
    torch.manual_seed(0)
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


def test_short_calls_by_proton(monkeypatch):
    class FakeSession:
        """50 calls, each with kernels of 2 and 3 microseconds; `stop` writes what Proton writes."""

        def __init__(self, name):
            self.name = name

        def start(self):
            pass

        def stop(self):
            leaves = [
                {"frame": {"name": name}, "metrics": {"time (ns)": 50 * ns, "count": 50}, "children": []}
                for name, ns in (("a", 2000), ("b", 3000))
            ]
            tree = [{"frame": {"name": "ROOT"}, "metrics": {}, "children": leaves}, {"CUDA": {}}]
            self.name.with_suffix(".hatchet").write_text(json.dumps(tree))

    monkeypatch.setattr(short, "Session", FakeSession)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    where = setting(proton=True, clock=FixedClock(0.05), impls=("eager",), directions=("forward",))
    (found,) = records(squares(), where)
    assert (found["ms"], found["kernel ms"]) == (0.05, pytest.approx(0.005))
    assert "kernels alone 0.0050 ms" in table.line(found)
    (found,) = records(squares(), replace(where, clock=FixedClock(0.2)))
    assert (found["ms"], found["kernel ms"]) == (0.2, None)
    monkeypatch.setattr(FakeSession, "stop", lambda session: 1 / 0)
    (found,) = records(squares(), where)
    assert (found["status"], found["ms"], found["kernel ms"]) == ("ok", 0.05, None)
    assert "proton: ZeroDivisionError" in table.line(found)


# ---- the command


def lines(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_every_operation_runs_on_a_cpu(tmp_path, monkeypatch, capsys):
    torch.set_num_threads(1)  # the sizes are too small for more
    monkeypatch.setitem(command.SECONDS, "cpu", 0.001)
    monkeypatch.setattr(command, "reached", lambda device: reached(device, rounds=1))
    monkeypatch.setattr(command, "cache_bytes", lambda device: 2**16)
    file = tmp_path / "results" / "kernels.jsonl"
    words = ["kernels", "--device", "cpu", "--impls", "ours,eager,others", "--results", str(file)]
    assert main(words) == 0
    printed = capsys.readouterr().out
    assert "references on a CPU" in printed
    assert "measured peaks: copy GB/s " in printed
    assert "[1/13]" in printed
    found = lines(file)
    assert {r["op"] for r in found} == set(OPS)
    assert {r["impl"] for r in found} == {"eager", "cdist", "torch noise"}
    for r in found:
        assert r["kind"] == "kernels"
        assert (r["device"], r["driver"], r["dtype"]) == ("cpu", None, "fp32")
        assert {"date", "commit", "torch", "triton", "python", "config", "recipes", "why"} <= r.keys()
        assert r["recipe"] in ("small", "small encoder", "small decoder")
        assert r["status"] == "ok", r["why"]
        assert 0 < r["ms_p20"] <= r["ms"] <= r["ms_p80"]
        assert r["rounds"] >= FEWEST
        if r["op"] != "mlp":  # not offered in fp32: no contract
            assert r["GB/s"] == pytest.approx(r["GB"] / r["ms"] * 1e3)
        if r["TFLOP"] == 0:
            assert 0 < r["share of peak"] == pytest.approx(r["bound ms"] / r["ms"])
    assert {r["direction"] for r in found if r["op"] == "mask_indices"} == {"forward"}
    assert {r["direction"] for r in found if r["op"] == "nhsic"} == {"forward", "backward", "both"}
    assert len({json.dumps([r[k] for k in ("op", "recipe", "dtype", "direction", "impl")]) for r in found}) == len(
        found
    )


def test_compiled_references_are_rivals(tmp_path, monkeypatch):
    monkeypatch.setattr(command, "reached", lambda device: {})
    words = "kernels mask_indices --device cpu --impls eager,compiled --results".split()
    assert main([*words, str(tmp_path / "k.jsonl")]) == 0
    assert [(r["impl"], r["status"]) for r in lines(tmp_path / "k.jsonl")] == [("eager", "ok"), ("compiled", "ok")]


@pytest.fixture
def three_cases(monkeypatch):
    """The command's cases are three; the second's inputs cannot be drawn."""
    cases = [squares(), replace(squares(), draw=lambda device: 1 / 0), squares()]
    monkeypatch.setattr(command, "entries", lambda *asked: [Entry(case, ("small",)) for case in cases])
    monkeypatch.setattr(command, "reached", lambda device: {})
    monkeypatch.setitem(command.SECONDS, "cpu", 0.001)
    return "kernels --device cpu --impls eager --directions forward --results".split()


def test_a_failing_case_does_not_stop_the_next(three_cases, tmp_path, capsys):
    assert main([*three_cases, str(tmp_path / "k.jsonl")]) == 1
    assert [r["status"] for r in lines(tmp_path / "k.jsonl")] == ["ok", "failed", "ok"]
    assert "NOT ok: square fp32 small, all (all): ZeroDivisionError" in capsys.readouterr().out


def test_ctrl_c_leaves_what_was_done(three_cases, tmp_path, monkeypatch, capsys):
    file, measured = tmp_path / "k.jsonl", command.records

    def records(case, setting):
        if file.exists():
            raise KeyboardInterrupt
        yield from measured(case, setting)

    monkeypatch.setattr(command, "records", records)
    assert main([*three_cases, str(file)]) == 130
    assert [r["status"] for r in lines(file)] == ["ok"]
    assert f"stopped; what was done is in {file}" in capsys.readouterr().err


def test_what_there_is_no_time_for_is_named(three_cases, tmp_path, monkeypatch, capsys):
    clock, measured = [0.0], command.records

    def records(case, setting):
        clock[0] += 12 if clock[0] else 8
        yield from measured(case, setting)

    monkeypatch.setattr(command, "records", records)
    monkeypatch.setattr(command.time, "monotonic", lambda: clock[0])
    main([*three_cases, str(tmp_path / "k.jsonl"), "--seconds", "31"])
    printed = capsys.readouterr().out
    assert [r["status"] for r in lines(tmp_path / "k.jsonl")] == ["ok", "failed"]
    assert "[2/3] square fp32 n6 (small); about 16 s left" in printed
    assert "left out for lack of time, 1 of 3 cases: square fp32 small" in printed


def test_a_case_that_takes_too_long_is_ended(three_cases, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(command, "records", lambda case, setting: signal.pause())
    assert main([*three_cases, str(tmp_path / "k.jsonl"), "--seconds", "0.2"]) == 0
    assert "left out for lack of time, 3 of 3 cases" in capsys.readouterr().out
    assert signal.getitimer(signal.ITIMER_REAL)[0] == 0


def test_a_lost_context_ends_the_worker(three_cases, tmp_path, monkeypatch):
    monkeypatch.setattr(command, "context_is_dead", lambda device: (tmp_path / "number").read_text() == "1")
    words = [*three_cases, str(tmp_path / "k.jsonl"), "--progress", str(tmp_path / "number")]
    assert main(words) == CONTEXT_LOST
    assert [r["status"] for r in lines(tmp_path / "k.jsonl")] == ["ok", "failed"]
    assert main([*words, "--first", "2"]) == 0
    assert [r["status"] for r in lines(tmp_path / "k.jsonl")] == ["ok", "failed", "ok"]


def test_a_crash_costs_one_case(tmp_path):
    script = """
import os, sys
words = dict(zip(sys.argv[2::2], sys.argv[3::2]))
for number in range(int(words["--first"]), 4):
    open(words["--progress"], "w").write(str(number))
    open(sys.argv[1], "a").write(f"{number} ")
    if number == 1:
        os.kill(os.getpid(), 9)
    if number == 2:
        sys.exit(75)
"""
    done, crashed = tmp_path / "done", []
    arguments = [sys.executable, "-c", script, str(done)]
    assert supervise(arguments, 4, 100.0, lambda *how: crashed.append(how)) == 1
    assert done.read_text() == "0 1 2 3 "
    assert crashed == [(1, -9)]
    assert supervise([sys.executable, "-c", "raise SystemExit(130)"], 4, None, lambda *how: None) == 130
    assert supervise([sys.executable, "-c", "raise SystemExit(9)"], 4, None, lambda *how: None) == 1


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        ("gelu", f"op: expected some of {', '.join(OPS)}; got gelu"),
        ("--recipes small,large", "recipes: expected some of imagenet_vit_b, "),
        ("--dtypes fp8", "dtypes: expected some of bf16, fp16, fp32; got fp8"),
        ("--directions back", "directions: expected some of forward, backward, both; got back"),
        ("--impls ,", "impls: expected some of ours, eager, compiled, others; got nothing"),
        ("--proton --device cpu", "proton: it times kernels on a real GPU only"),
        ("--seconds 0", "seconds: expected more than 0, got 0"),
        ("--pretend /no/such/wrapper", "pretend: no file /no/such/wrapper"),
    ],
)
def test_wrong_arguments_in_one_line(words, complaint, capsys):
    assert main(["kernels", *words.split()]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert complaint in line


def test_recipes_of_one_shape_share_a_case_and_the_usual_dtype_comes_first():
    recipes = ["imagenet_vit_s", "imagenet_vit_b", "cifar10_vit_s"]
    found = entries(["linf_start", "mlp"], recipes, ["bf16", "fp32"])
    assert [(e.case.op, e.case.dtype, e.recipes) for e in found[:4]] == [
        ("mlp", "bf16", ("imagenet_vit_s",)),  # encoder
        ("mlp", "bf16", ("imagenet_vit_s", "imagenet_vit_b")),  # decoder
        ("linf_start", "fp32", ("imagenet_vit_s", "imagenet_vit_b")),
        ("mlp", "bf16", ("imagenet_vit_b",)),
    ]
    assert found[0].case.shape == {"B": 512, "T": 50, "D": 384, "F": 1536}
    cifar = next(e.case for e in found if e.recipes == ("cifar10_vit_s",) and e.case.part == "decoder")
    assert cifar.shape == {"B": 128, "T": 257, "D": 128, "F": 512}


def test_under_pytest_benchmark():
    pytest.importorskip("pytest_benchmark")
    words = ["--benchmark-only", "-p", "no:cacheprovider", "-k", "mask_indices and eager"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    command = [sys.executable, "-m", "pytest", "bench", *words]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "benchmark 'mask_indices fp32 B8 L64 forward': 1 tests" in done.stdout
    assert "1 passed" in done.stdout
