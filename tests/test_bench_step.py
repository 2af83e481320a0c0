"""The roofline of the step: prices against hand-counted cases, the table from a small recorded trace, wrong arguments."""

import importlib
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch._inductor.runtime.triton_heuristics import CachingAutotuner
from torch._subclasses import FakeTensorMode

from bench.__main__ import main
from bench.step import counts, table
from bench.step.contracts import CONTRACTS
from bench.step.peaks import PEAKS, peak_of
from bench.step.pricing import Price, Setting, price
from bench.step.roofline import convolutions, from_launches, price_all
from bench.step.trace import Call, Recorder, Spec, record
from bench.step.variants import ConvolutionStandIn, build_step, configuration

ROOT = Path(__file__).parents[1]
WRAPPER = ROOT.parent / "shared" / "tools" / "drygpu" / "drygpu"  # an outside program, where it is there
H100 = PEAKS["h100"]
SETTING = Setting(tf32=False)


def priced(function) -> list[Price]:
    """Prices of what a function runs on the CPU."""
    return [p for call in record(function, "cpu") for p in price(call, SETTING)]


def test_matrix_product():
    bias, a, b = torch.zeros(7), torch.zeros(3, 5, dtype=torch.bfloat16), torch.zeros(5, 7, dtype=torch.bfloat16)
    product, biased = priced(lambda: (a @ b, torch.addmm(bias.bfloat16().expand(3, 7), a, b)))[0::2]
    assert (product.kind, product.flops) == ("GEMM", {"bf16": 2 * 3 * 5 * 7})
    assert product.bytes == 2 * (3 * 5 + 5 * 7 + 3 * 7)
    assert biased.flops == product.flops
    assert biased.bytes == product.bytes + 2 * 7  # the expanded bias is seven numbers
    batched = priced(lambda: torch.bmm(torch.zeros(4, 3, 5), torch.zeros(4, 5, 7)))[-1]
    assert batched.flops == {"fp32": 4 * 2 * 3 * 5 * 7}
    (call,) = record(lambda: torch.mm(a.float(), b.float()), "cpu")[-1:]
    assert price(call, Setting(tf32=True))[0].flops == {"tf32": 2 * 3 * 5 * 7}


def test_bound_is_the_slower_of_arithmetic_and_memory():
    assert Price("GEMM", "", 3.35e12, {"bf16": 1.0}).seconds(H100) == 1.0
    assert Price("GEMM", "", 1.0, {"bf16": 989e12}).seconds(H100) == 1.0
    assert Price("GEMM", "", 1.0, {"bf16": 989e12, "fp32": 67e12}).seconds(H100) == 2.0
    assert Price("solves", "", 1.0, solve=0.5).seconds(H100) == 0.5
    assert Price("GEMM", "", 2.04e12, {"bf16": 312e12 * 3}).seconds(PEAKS["a100"]) == 3.0


def test_elementwise_and_copies():
    x, y, out = torch.zeros(10, 6), torch.zeros(1, 6), torch.zeros(10, 6)
    cases = {
        "add": (lambda: x + y.expand(10, 6), "other ATen", 4 * (60 + 6 + 60)),
        "add_": (lambda: x.add_(1), "other ATen", 4 * (60 + 60)),  # read and written
        "mul": (lambda: torch.mul(x, y, out=out), "other ATen", 4 * (60 + 6 + 60)),  # out is not read
        "copy_": (lambda: out.copy_(x), "copies", 4 * (60 + 60)),
        "fill_": (lambda: out.fill_(1), "copies", 4 * 60),
        "cat": (lambda: torch.cat([x, x]), "copies", 4 * (120 + 120)),
        "_to_copy": (lambda: x.bfloat16(), "copies", 60 * (4 + 2)),
        "sum": (lambda: x.sum(), "other ATen", 4 * (60 + 1)),
        "gather": (lambda: x.gather(0, torch.zeros(2, 6, dtype=torch.int64)), "other ATen", 12 * (4 + 8 + 4)),
        "_foreach_mul_": (lambda: torch._foreach_mul_([x, out], 2.0), "other ATen", 4 * 4 * 60),
    }
    for name, (function, kind, count) in cases.items():
        last = priced(function)[-1]
        assert last.name.split(".")[1] == name
        assert (last.kind, last.bytes, last.flops) == (kind, count, {}), name


def test_views_and_empty_memory_cost_nothing():
    x = torch.zeros(4, 6)
    assert (
        priced(lambda: (x.view(6, 4).t()[1:], x.expand(2, 4, 6), x.detach(), torch.empty(3), torch.empty_like(x))) == []
    )
    assert record(lambda: x + 1, "cuda") == []  # tensors elsewhere


def test_attention():
    B, N, T, d = 2, 3, 5, 8
    part = Spec((B, N, T, d), "bfloat16", 2 * B * N * T * d)
    sums = Spec((B, N, T), "float32", 4 * B * N * T)
    reads = {name: [part] for name in ("query", "key", "value")}
    forward = Call("op", "aten._scaled_dot_product_flash_attention.default", reads, [part, sums])
    more = {**reads, "grad_out": [part], "out": [part], "logsumexp": [sums]}
    backward = Call("op", "aten._scaled_dot_product_flash_attention_backward.default", more, [part] * 3)
    (p,), (q,) = price(forward, SETTING), price(backward, SETTING)
    assert (p.kind, p.flops, p.bytes) == ("attention", {"bf16": 4 * B * N * T * T * d}, 4 * part.bytes + sums.bytes)
    assert (q.kind, q.flops, q.bytes) == ("attention", {"bf16": 10 * B * N * T * T * d}, 8 * part.bytes + sums.bytes)


def test_fused_adamw_moves_seven_times_the_parameters():
    parameters = [torch.nn.Parameter(torch.zeros(n)) for n in (100, 28)]
    optimizer = torch.optim.AdamW(parameters, fused=True)
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    (update,) = [p for p in priced(optimizer.step) if p.kind == "AdamW"]
    assert update.bytes == 7 * 4 * 128


def test_dense_solves_have_the_published_figure():
    matrix = 2 * torch.eye(64, dtype=torch.float64)
    solves = [
        p for p in priced(lambda: torch.cholesky_inverse(torch.linalg.cholesky_ex(matrix)[0])) if p.kind == "solves"
    ]
    assert [p.solve for p in solves] == pytest.approx([0.38e-3 / 8, 2 * 0.38e-3 / 8])
    assert [p.why for p in solves] == ["", ""]
    (eigen,) = [p for p in priced(lambda: torch.linalg.eigvalsh(matrix)) if p.kind == "solves"]
    assert "no figure" in eigen.why


def test_convolution_and_its_stand_in():
    images, weight, bias = torch.zeros(2, 3, 8, 8), torch.zeros(5, 3, 4, 4), torch.zeros(5)

    def both():
        w, b, x = (t.clone().requires_grad_() for t in (weight, bias, images))
        torch.nn.functional.conv2d(x, w, b, stride=4).sum().backward()

    once = 2 * (2 * 5 * 2 * 2) * (3 * 4 * 4)
    real = [p.flops for p in priced(both) if p.kind == "GEMM"]
    assert real == [{"fp32": once}, {"fp32": 2 * once}]
    with ConvolutionStandIn():
        calls = record(both, "cpu")
    assert [p.flops for call in calls for p in price(call, SETTING) if p.kind == "GEMM"] == real
    assert convolutions(calls) == 3
    with ConvolutionStandIn():
        (unwanted,) = torch.ops.aten.convolution_backward(
            images[:, :1, :2, :2], images, weight, [5], [4, 4], [0, 0], [1, 1], False, [0, 0], 1, [False, True, False]
        )[::2][:1]
    assert unwanted is None


@pytest.fixture(scope="module", autouse=True)
def operators():
    """Every operator of ours is registered."""
    for folder in (ROOT / "kernels").glob("*/kernel.py"):
        importlib.import_module(f"mimir_fast.kernels.{folder.parent.name}.kernel")


def test_every_operation_of_ours_has_a_contract():
    names = [name.split("::")[1] for name in torch._C._dispatch_get_all_op_names() if name.startswith("mimir_fast::")]
    assert set(names) == set(CONTRACTS)


def test_contracts_against_hand_counts():
    """B=2 images of 3x8x8 in patches of 4: L=4, P=48; one patch kept; storage fp32, indices 8 bytes."""
    B, L, K, P, E, m, d = 2, 4, 1, 48, 6, 8, 10
    ops = torch.ops.mimir_fast
    image, patches = 4 * B * 3 * 64, 4 * B * (L - K) * P
    with FakeTensorMode():
        M = L - K
        images, pred, removed = torch.zeros(B, 3, 8, 8), torch.zeros(B, M, P), torch.zeros(B, M, dtype=torch.int64)
        noise, keep, restore = (
            torch.zeros(B, L),
            torch.zeros(B, K, dtype=torch.int64),
            torch.zeros(B, L, dtype=torch.int64),
        )
        visible, bounds, one = torch.zeros(B, K, P), torch.zeros(4, 3), torch.zeros(())
        tokens, positions, square = torch.zeros(B, 1 + K, E), torch.zeros(1 + L, E), torch.zeros(m, m)
        x, y, seed = torch.zeros(m, d), torch.zeros(m, 2 * d), torch.zeros((), dtype=torch.int64)
        f32, bf16 = torch.float32, torch.bfloat16
        n = 130  # rows: two groups, for E is 6 and a tile has 128 rows
        rows, branch, row, row16 = (
            torch.zeros(n, E),
            torch.zeros(n, E, dtype=bf16),
            torch.zeros(E),
            torch.zeros(E, dtype=bf16),
        )
        weight16, hidden16 = torch.zeros(7, E, dtype=bf16), torch.zeros(7, dtype=bf16)
        loss = (pred, images, removed, 4, True)
        cases = {
            "mask_indices": ((noise,), 4 * B * L + 2 * 8 * B * L),
            "patch_gather": ((images, keep, 4, 0.5, bf16), B * K * (P * (4 + 2) + 8)),
            "patch_gather_grad": ((visible, keep, [B, 3, 8, 8], 4, f32), B * K * (4 * P + 8) + image),
            "linf_start": ((images, bounds, seed), 2 * image),
            "linf_patch_step": (
                (images, images, visible, pred, restore, bounds, 4, True),
                3 * image + 4 * B * K * P + 4 * B * (L - K) * P + 8 * B * L,
            ),
            "masked_patch_loss": (loss, 2 * patches + 8 * B * M + 2 * 4 * B * M),
            "masked_patch_loss_grad_pred": ((one, *loss), 3 * patches + 8 * B * M),
            "masked_patch_loss_grad_images": ((one, *loss), 3 * patches + 8 * B * M + image),
            "token_restore": (
                (tokens, torch.zeros(E), positions, restore),
                4 * (B * (1 + K) * E + E + (1 + L) * E) + 8 * B * L + 4 * B * (1 + L) * E,
            ),
            "token_restore_grad": (
                (torch.zeros(B, 1 + L, E), K, f32),
                4 * B * (1 + L) * E + 4 * E,
            ),
            "short_attention": ((torch.zeros(B, L, 3 * E), 2), 4 * 4 * B * L * E),
            "short_attention_grad": ((torch.zeros(B, L, E), torch.zeros(B, L, 3 * E), 2), 7 * 4 * B * L * E),
            "add_layer_norm": (
                (rows, branch, row16, row, row, 1e-6, bf16),
                n * E * (4 + 2) + E * (2 + 4 + 4) + n * (E * (4 + 2) + 2 * 4),
            ),
            "add_layer_norm_grad": (
                (rows, branch, rows, torch.zeros(2, n), row, bf16, True, bf16),
                n * (E * (4 + 2 + 4) + 8) + 4 * E + n * E * (4 + 2) + E * (4 + 4 + 2) + 2 * 3 * 4 * E * 2,
            ),
            "linear_gelu": ((branch, weight16, hidden16), 2 * (n * E + 7 * E + 7 + 2 * n * 7)),
            "gelu_linear_grad": (
                (branch, weight16.T, torch.zeros(n, 7, dtype=bf16), True),
                2 * (n * E + 7 * E + 2 * n * 7 + 7) + 2 * 4 * 2 * 7,  # two tiles of rows
            ),
            "nhsic": ((x, y, 5.0), 4 * m * (d + 2 * d) * 3 + 2 * 5 * 2 * 4 * m * m),
            "nhsic_grad": (
                (one, x, square, square, square, 5.0, f32),
                4 * m * d * 2 + 3 * 4 * m * m + 5 * 2 * 4 * m * m,
            ),
        }
        prices = {}
        for name, (arguments, _) in cases.items():
            with Recorder("cpu") as recorder:
                getattr(ops, name)(*arguments)
            (call,) = recorder.calls
            prices[name] = price(call, SETTING)
    for name, (_, count) in cases.items():
        ours = prices[name][0]
        assert (ours.bytes, ours.why) == (count, ""), name
    assert cases.keys() == CONTRACTS.keys()
    assert prices["nhsic"][0].flops == {"tf32": 3 * m * m * 3 * d}
    assert prices["short_attention"][0].flops == {"tf32": 4 * B * L * L * E}
    assert prices["short_attention_grad"][0].flops == {"tf32": 10 * B * L * L * E}
    assert prices["linear_gelu"][0].flops == prices["gelu_linear_grad"][0].flops == {"bf16": 2 * n * E * 7}
    kinds = {name: p[0].kind for name, p in prices.items() if p[0].kind != "ours"}
    assert kinds == dict.fromkeys(("short_attention", "short_attention_grad"), "attention") | dict.fromkeys(
        ("linear_gelu", "gelu_linear_grad"), "GEMM"
    )
    assert prices["nhsic_grad"][0].flops == {"tf32": 3 * (2 * 2 * m**3 + 2 * m * m * d)}
    assert sum(p.solve for p in prices["nhsic"][1:]) == pytest.approx(6 * 0.38e-3 * m / 512)


def test_contract_of_a_layer_norm_that_adds_nothing_and_learns_nothing():
    n, D, bf16 = 20, 64, torch.bfloat16
    ops = torch.ops.mimir_fast
    with FakeTensorMode(), Recorder("cpu") as recorder:
        x, row = torch.zeros(n, D), torch.zeros(D)
        _, out, statistics = ops.add_layer_norm(x, None, None, row, row, 1e-6, bf16)
        ops.add_layer_norm_grad(None, out, x, statistics, row, None, False, None)
    forward, backward = (p for call in recorder.calls for p in price(call, SETTING) if p.kind == "ours")
    assert forward.bytes == n * (D * (4 + 2) + 8) + 2 * 4 * D
    assert backward.bytes == n * (D * (2 + 4 + 4) + 8) + 4 * D


def test_what_has_no_price_is_named():
    part = Spec((4,), "float32", 16)
    new = price(Call("op", "mimir_fast.something_new.default", {"x": [part]}, [part]), SETTING)[0]
    assert (new.kind, new.bytes) == ("ours", 32)
    assert "no contract" in new.why
    kernel = price(Call("inductor", "triton_poi_0", {"arguments": [part, part]}), SETTING)[0]
    assert (kernel.kind, kernel.bytes) == ("Inductor", 32)
    assert "no byte count" in kernel.why
    counted = price(Call("inductor", "triton_poi_0", {"arguments": [part]}, gb=2.0), SETTING)[0]
    assert (counted.bytes, counted.why) == (2e9, "")
    template = price(
        Call("inductor", "triton_tem_0", {"arguments": [Spec((4,), "bfloat16", 8)]}, gb=1.0, flop=3), SETTING
    )
    assert (template[0].kind, template[0].flops) == ("GEMM", {"bf16": 3})


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
