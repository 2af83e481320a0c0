"""The step's recorder, table and command: recorded traces, the whole step, wrong arguments, the pretend GPU."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch._inductor.runtime.triton_heuristics import CachingAutotuner

from bench.__main__ import main
from bench.peaks import PEAKS, peak_of
from bench.step import counts, table
from bench.step.pricing import Price
from bench.step.roofline import from_launches, price_all
from bench.step.trace import record
from bench.step.variants import build_step, configuration

ROOT = Path(__file__).parents[2]
WRAPPER = ROOT.parent / "shared" / "tools" / "drygpu" / "drygpu"  # an outside program, where it is there
H100 = PEAKS["h100"]


def test_inductor_launches_are_recorded(monkeypatch):
    launched = []
    monkeypatch.setattr(CachingAutotuner, "run", lambda self, *args, **kwargs: launched.append(args))
    kernel = object.__new__(CachingAutotuner)
    kernel.inductor_meta = {"kernel_num_gb": 1.5}
    kernel.fn = type("Source", (), {"__name__": "triton_red_fused_7", "fn": None})()  # as Inductor's cache returns it
    kernel.filename = "/cache/abc/cabcdef.py"
    marks = []
    x = torch.zeros(3)
    calls = record(lambda: (x + 1, kernel.run(x, 3, stream=0)), "cpu", marks.append)
    assert [(c.name, c.gb, c.file) for c in calls] == [
        ("aten.add.Tensor", None, ""),
        ("triton_red_fused_7", 1.5, "cabcdef"),
    ]
    assert marks == [0, -1, 1, -1]
    assert len(launched) == 1


STEP = """MARK|step
KERNEL|add|1,1,1|1,1,1|0
TRITON|triton_0|1,1,1|1,1,1|0|16
GEMM|Lt|TN|m=1,n=1,k=1,b=1|bf16->bf16|ep=1
KERNEL|_Z7strangeiPf|1,1,1|1,1,1|0
MEMSET|64
MEMSET|32
MEMCPY|D2D|100
MEMCPY|D2H|4
SYNC|stream
MARK|end
"""
TRACE = """MARK|trace
MARK|0
KERNEL|add|1,1,1|1,1,1|0
TRITON|triton_0|1,1,1|1,1,1|0|16
GEMM|Lt|TN|m=1,n=1,k=1,b=1|bf16->bf16|ep=1
MEMSET|64
MARK|-1
KERNEL|_Z7strangeiPf|1,1,1|1,1,1|0
MEMCPY|D2D|100
MARK|1
MEMSET|32
MEMCPY|D2H|4
SYNC|stream
MARK|-1
MARK|end
"""


def test_log_of_the_pretend_gpu(tmp_path):
    log = tmp_path / "log"
    log.write_text("KERNEL|warm_up|1,1,1|1,1,1|0\n" + STEP + TRACE + "KERNEL|after|1,1,1|1,1,1|0\n")
    counted = counts.from_log(log)
    assert counted == counts.Counts(kernels=3, gemms=1, memsets=2, syncs=1, to_host=1)
    assert counted.launches == 6
    calls = [[Price("other ATen", "aten.add.Tensor", 8)], [Price("copies", "aten.zero_.default", 32)]]
    extra, outside = from_launches(calls, counts.launches_by_call(log))
    assert [(p.kind, p.name, p.bytes) for p in extra] == [("copies", "memset", 64), ("copies", "memcpy D2D", 200)]
    assert outside in ({"strange": 1}, {"_Z7strangeiPf": 1})
    log.write_text(STEP + TRACE.replace("TRITON|triton_0|1,1,1|1,1,1|0|16\n", ""))
    with pytest.raises(RuntimeError, match="tracing changed the step"):
        counts.from_log(log)
    log.write_text((STEP + TRACE).replace("SYNC|stream", "GRAPH|launch|0x1"))
    with pytest.raises(RuntimeError, match="CUDA graph"):
        counts.from_log(log)


def test_compiled_code_stays_compiled_while_recorded():
    runs = []

    def backend(graph, _):
        return lambda *inputs: runs.append(1) or graph(*inputs)

    compiled = torch.compile(lambda x: x.sin() + 1, backend=backend)
    x = torch.zeros(3)
    compiled(x)
    calls = record(lambda: compiled(x), "cpu")
    assert len(runs) == 2
    assert [call.op for call in calls] == ["sin", "add"]


def test_the_references_are_the_references_in_every_part(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    ours, references = (
        configuration(variant, ["--residual_dtype", "bf16"]).compute for variant in ("ours", "references")
    )
    assert (ours.kernels, ours.attention, ours.mlp) == ("triton", "short", "triton")
    assert (references.kernels, references.attention, references.mlp) == ("reference", "sdpa", "reference")


@pytest.mark.parametrize("variant", ["references", "textbook"])
def test_a_whole_step_on_the_cpu_leaves_nothing_unpriced(variant):
    words = "--model mae_vit_ti --batch_size 2 --input_size 32 --patch_size 8 --device cpu --no_compile".split()
    config = configuration(variant, words)
    calls = record(build_step(variant, config, torch.device("cpu")), "cpu")
    prices = [p for parts in price_all(calls) for p in parts]
    kinds = {p.kind for p in prices}
    assert kinds >= {"GEMM", "AdamW", "solves", "copies", "other ATen"}
    roofline = table.Roofline(prices, H100, counts.Counts(0, 0, 0, 0, 0), 0.0, 2)
    assert roofline.unpriced() == []
    # 12 blocks of width 192, 5 tokens; 5 forwards' worth in all: 4 products of 12 D^2 in sum, forward 2, backward 3
    blocks = 5 * 12 * 2 * (2 * 5) * 12 * 192**2
    assert blocks < roofline.classes()["GEMM"]["tflop"] * 1e12 < 1.5 * blocks


def test_table_and_record():
    prices = [
        Price("GEMM", "aten.mm.out", 1e9, {"bf16": 989e9}),
        Price("GEMM", "aten.mm.out", 1e9, {"bf16": 989e9}),
        Price("attention", "flash", 1e9),
        Price("Inductor", "triton_poi_0", 3.35e9, file="ca"),
        Price("Inductor", "triton_poi_0", 3.35e9, file="ca"),
        Price("Inductor", "triton_poi_0", 3.35e9, file="cb"),  # the same name in another graph
        Price("other ATen", "aten.sign.default", 67e9),
        Price("solves", "aten.inverse", 0, solve=2e-3),
        Price("ours", "mimir_fast.new", 1e9, why="no contract"),
    ]
    counted = counts.Counts(10, 2, 3, 1, 4)
    shared = {"outside": {"strange": 2}, "nodes": {"ca": "[gelu] gelu"}}
    record = table.Roofline(prices, H100, counted, 1.5, 64, **shared, ms=50.0).record()
    assert json.loads(json.dumps(record)) == record
    assert record["classes"]["GEMM"] == pytest.approx({"count": 2, "gb": 2, "tflop": 1.978, "bound_ms": 2})
    totals = record["totals"]
    assert (totals["launches"], totals["syncs"], totals["to_host"], totals["peak_gib"]) == (15, 1, 4, 1.5)
    assert totals["gb"] == pytest.approx(2 + 1 + 3 * 3.35 + 67 + 1)
    assert totals["gb_outside_gemm_attention"] == pytest.approx(3 * 3.35 + 67 + 1)
    assert totals["bound_ms"] == pytest.approx(2 + 3 + 20 + 2 + 2 / 3.35)
    assert totals["bound_without_solves_ms"] == pytest.approx(totals["bound_ms"] - 2)
    assert [(t["count"], t["nodes"]) for t in record["top"]] == [(2, "[gelu] gelu"), (1, "")]
    assert {u["name"]: u["count"] for u in record["unpriced"]} == {"mimir_fast.new": 1, "strange": 2}
    assert record["remainder"] == [{"name": "aten.sign.default", "count": 1, "gb": 67.0}]
    measured = record["measured"]
    assert measured["images_per_s"] == pytest.approx(64 / 0.050)
    assert measured["mfu"] == pytest.approx(2 * 989e9 / (0.050 * 989e12))
    assert measured["share_of_bound"] == pytest.approx(totals["bound_ms"] / 50)
    text = "\n".join(table.lines(record))
    for word in (
        "10 + 2 + 3 = 15",
        "syncs 1",
        "measured 50.00 ms, 1280 images/s",
        "aten.sign.default",
        "strange",
        "[gelu] gelu",
    ):
        assert word in text, word


def test_peaks():
    assert peak_of("NVIDIA H100 80GB HBM3") == "h100"
    assert peak_of("NVIDIA A100-SXM4-80GB") == "a100"
    with pytest.raises(ValueError, match=r"gpu: .*RTX 3090.*--gpu"):
        peak_of("NVIDIA GeForce RTX 3090")
    assert all(math.isclose(p.flops["tf32"] * 2, p.flops["bf16"]) for p in PEAKS.values())


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        ("--batch 0", "batch: expected 1 or more, got 0"),
        ("--pretend /no/such/wrapper", "pretend: no file /no/such/wrapper"),
        ("extra", "'extra' is not known"),
    ],
)
def test_wrong_arguments(words, complaint, capsys):
    assert main(["step", *words.split()]) == 2
    assert complaint in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is here")
def test_without_a_gpu_it_says_what_to_do(capsys):
    assert main(["step"]) == 2
    assert "no CUDA device here; --pretend WRAPPER" in capsys.readouterr().err


def test_unknown_verb_and_model(capsys):
    assert main(["steps"]) == 2
    assert "step " in capsys.readouterr().err
    with pytest.raises(ValueError, match="mask_ratio"):
        configuration("ours", ["--mask_ratio", "2"])


def test_on_the_pretend_gpu(tmp_path):
    if not WRAPPER.exists():
        pytest.skip(f"no pretend GPU at {WRAPPER}")
    record, printed = on_the_pretend_gpu(tmp_path, "textbook", "--gpu a100")
    assert (record["device"], record["variant"], record["measured"]) == ("pretend-a100", "textbook", None)
    assert record["config"]["batch_size"] == 2
    assert record["unpriced"] == []
    assert record["totals"]["gemms"] == record["classes"]["GEMM"]["count"]
    assert record["totals"]["kernels"] > 500
    assert "nothing" in printed


def test_our_kernels_on_the_pretend_gpu_without_waiting_for_them(tmp_path):
    if not WRAPPER.exists():
        pytest.skip(f"no pretend GPU at {WRAPPER}")
    record, _ = on_the_pretend_gpu(tmp_path, "ours", "-- --no_compile --residual_dtype bf16")
    assert record["totals"]["syncs"] == record["totals"]["to_host"] == 0
    assert record["unpriced"] == []
    launched = set(record["ours"])
    assert {
        "mask_indices",
        "patch_gather",
        "token_restore",
        "masked_patch_loss",
        "masked_patch_loss_grad_pred",
    } <= launched
    assert {
        "linf_start",
        "linf_patch_step",
        "nhsic",
        "nhsic_grad",
        "short_attention",
        "short_attention_grad",
    } <= launched


def on_the_pretend_gpu(folder, variant: str, words: str) -> tuple[dict, str]:
    """The record and the text of a small step."""
    own, _, flags = words.partition("--" if words.startswith("-- ") else "-- ")
    size = "--model mae_vit_ti --batch 2 --input_size 32 --patch_size 8".split()
    results = folder / "step.jsonl"
    command = [sys.executable, "-m", "bench", "step", "--variant", variant, *size, *own.split()]
    command += ["--pretend", str(WRAPPER), "--results", str(results), "--", *flags.split()]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (record,) = map(json.loads, results.read_text().splitlines())
    return record, done.stdout
