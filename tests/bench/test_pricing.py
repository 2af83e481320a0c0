"""Prices of operations against hand-counted cases, and a contract for every operation of ours."""

import importlib
from pathlib import Path

import pytest
import torch
from torch._subclasses import FakeTensorMode

from bench.peaks import PEAKS
from bench.step.contracts import CONTRACTS
from bench.step.pricing import Price, Setting, price
from bench.step.roofline import convolutions
from bench.step.trace import Call, Recorder, Spec, record
from bench.step.variants import ConvolutionStandIn

ROOT = Path(__file__).parents[2]
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
    on_cpus_only = {"narrow_attention", "narrow_attention_grad"}  # no GPU step calls them
    assert set(names) - on_cpus_only == set(CONTRACTS)


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
                (rows, branch, row16, row, row, 1e-6, bf16, None),
                n * E * (4 + 2) + E * (2 + 4 + 4) + n * (E * (4 + 2) + 2 * 4),
            ),
            "add_layer_norm_grad": (
                (rows, branch, rows, torch.zeros(2, n), row, bf16, True, bf16, None),
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
        _, out, statistics = ops.add_layer_norm(x, None, None, row, row, 1e-6, bf16, None)
        ops.add_layer_norm_grad(None, out, x, statistics, row, None, False, None, None)
    forward, backward = (p for call in recorder.calls for p in price(call, SETTING) if p.kind == "ours")
    assert forward.bytes == n * (D * (4 + 2) + 8) + 2 * 4 * D
    assert backward.bytes == n * (D * (2 + 4 + 4) + 8) + 4 * D


def test_contract_of_a_layer_norm_with_factors_of_the_images():
    n, D, B, bf16 = 20, 64, 4, torch.bfloat16
    ops = torch.ops.mimir_fast
    with FakeTensorMode(), Recorder("cpu") as recorder:
        x, row, keep = torch.zeros(B, n // B, D, dtype=bf16), torch.zeros(D), torch.zeros(B)
        s, out, statistics = ops.add_layer_norm(x, x, None, row, row, 1e-6, bf16, keep)
        ops.add_layer_norm_grad(s, out, s, statistics, row, bf16, False, None, keep)
    forward, backward = (p for call in recorder.calls for p in price(call, SETTING) if p.kind == "ours")
    assert forward.bytes == n * (4 * 2 * D + 8) + 2 * 4 * D + 4 * B
    assert backward.bytes == n * (5 * 2 * D + 8) + 4 * D + 4 * B  # delta's gradient is one of its own


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
