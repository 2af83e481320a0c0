"""Prices of operations against hand-counted cases, and a contract for every operation of ours."""

import importlib
from pathlib import Path

import pytest
import torch
from torch._subclasses import FakeTensorMode

from bench.peaks import PEAKS
from bench.step.contracts import CONTRACTS
from bench.step.prices import Price, price
from bench.step.roofline import convolutions
from bench.step.trace import Call, Recorder, Spec, record
from bench.steps import ConvolutionStandIn

ROOT = Path(__file__).parents[2]
H100 = PEAKS["h100"]
BF16 = torch.bfloat16


def priced(function) -> list[Price]:
    """Prices of what a function runs on the CPU."""
    return [p for call in record(function, "cpu") for p in price(call)]


def test_matrix_product():
    bias, a, b = torch.zeros(7), torch.zeros(3, 5, dtype=BF16), torch.zeros(5, 7, dtype=BF16)
    product, biased = priced(lambda: (a @ b, torch.addmm(bias.bfloat16().expand(3, 7), a, b)))[0::2]
    assert (product.kind, product.flops) == ("GEMM", {"bf16": 2 * 3 * 5 * 7})
    assert product.bytes == 2 * (3 * 5 + 5 * 7 + 3 * 7)
    assert biased.flops == product.flops
    assert biased.bytes == product.bytes + 2 * 7  # the expanded bias is seven numbers
    batched = priced(lambda: torch.bmm(torch.zeros(4, 3, 5), torch.zeros(4, 5, 7)))[-1]
    assert batched.flops == {"fp32": 4 * 2 * 3 * 5 * 7}
    (call,) = record(lambda: torch.mm(a.float(), b.float()), "cpu")[-1:]
    assert price(call, tf32=True)[0].flops == {"tf32": 2 * 3 * 5 * 7}


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


def test_views_empty_memory_and_other_devices_cost_nothing():
    x = torch.zeros(4, 6)
    views = lambda: (x.view(6, 4).t()[1:], x.expand(2, 4, 6), x.detach(), torch.empty(3), torch.empty_like(x))  # noqa: E731
    assert priced(views) == []
    assert record(lambda: x + 1, "cuda") == []


def test_attention_adamw_and_solves():
    B, N, T, d = 2, 3, 5, 8
    part = Spec((B, N, T, d), "bfloat16", 2 * B * N * T * d)
    sums = Spec((B, N, T), "float32", 4 * B * N * T)
    reads = {name: [part] for name in ("query", "key", "value")}
    name = "aten._scaled_dot_product_flash_attention.default"
    (p,) = price(Call("op", name, reads, [part, sums], flops=4 * B * N * T * T * d))
    assert (p.kind, p.flops, p.bytes) == ("attention", {"bf16": 4 * B * N * T * T * d}, 4 * part.bytes + sums.bytes)
    parameters = [torch.nn.Parameter(torch.zeros(n)) for n in (100, 28)]
    optimizer = torch.optim.AdamW(parameters, fused=True)
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    (update,) = [p for p in priced(optimizer.step) if p.kind == "AdamW"]
    assert update.bytes == 7 * 4 * 128  # gradient read; parameter and two moments read and written
    square = torch.eye(256)
    solve = sum(p.solve for p in priced(lambda: torch.cholesky_inverse(torch.linalg.cholesky_ex(square)[0])))
    assert solve == pytest.approx(3 * 0.38e-3 / 2)


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
    assert [p.flops for call in calls for p in price(call) if p.kind == "GEMM"] == real
    assert convolutions(calls) == 3


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
    B, L, K, M, P, E, m, d, n, i64 = 2, 4, 1, 3, 48, 6, 8, 10, 130, torch.int64
    image, patches = 4 * B * 3 * 64, 4 * B * M * P
    t = lambda *shape: torch.zeros(*shape)  # noqa: E731
    with FakeTensorMode():
        images, pred, removed, restore = (
            t(B, 3, 8, 8),
            t(B, M, P),
            torch.zeros(B, M, dtype=i64),
            torch.zeros(B, L, dtype=i64),
        )
        keep, visible, bounds, square, seed = (
            torch.zeros(B, K, dtype=i64),
            t(B, K, P),
            t(4, 3),
            t(m, m),
            torch.zeros((), dtype=i64),
        )
        x, y, rows, branch, row, row16 = t(m, d), t(m, 2 * d), t(n, E), t(n, E).to(BF16), t(E), t(E).to(BF16)
        weight16, hidden16, loss = t(7, E).to(BF16), t(7).to(BF16), (pred, images, removed, 4, True)
        cases = {
            "mask_indices": ((t(B, L),), 4 * B * L + 2 * 8 * B * L),
            "patch_gather": ((images, keep, 4, 0.5, BF16), B * K * (P * (4 + 2) + 8)),
            "patch_gather_grad": ((visible, keep, [B, 3, 8, 8], 4, torch.float32), B * K * (4 * P + 8) + image),
            "linf_start": ((images, bounds, seed), 2 * image + 4 * 12 + 8),
            "linf_patch_step": (
                (images, images, visible, pred, restore, bounds, 4, True),
                3 * image + 4 * B * K * P + 4 * B * M * P + 8 * B * L + 4 * 12,
            ),
            "masked_patch_loss": (loss, 2 * patches + 8 * B * M + 2 * 4 * B * M),
            "masked_patch_loss_grad_pred": ((t(()), *loss), 3 * patches + 8 * B * M),
            "masked_patch_loss_grad_images": ((t(()), *loss), 3 * patches + 8 * B * M + image),
            "token_restore": (
                (t(B, 1 + K, E), t(E), t(1 + L, E), restore),
                4 * (B * (1 + K) * E + E + (1 + L) * E) + 8 * B * L + 4 * B * (1 + L) * E,
            ),
            "token_restore_grad": ((t(B, 1 + L, E), K, torch.float32), 4 * B * (1 + L) * E + 4 * E),
            "short_attention": ((t(B, L, 3 * E), 2), 4 * 4 * B * L * E),
            "short_attention_grad": ((t(B, L, E), t(B, L, 3 * E), 2), 7 * 4 * B * L * E),
            "add_layer_norm": (
                (rows, branch, row16, row, row, 1e-6, BF16, None),
                n * E * (4 + 2) + E * (2 + 4 + 4) + n * (E * (4 + 2) + 2 * 4),
            ),
            "add_layer_norm_grad": (  # two groups of rows, for a tile has 128
                (rows, branch, rows, t(2, n), row, BF16, True, BF16, None),
                n * (E * (4 + 2 + 4) + 8) + 4 * E + n * E * (4 + 2) + E * (4 + 4 + 2) + 2 * 3 * 4 * E * 2,
            ),
            "linear_gelu": ((branch, weight16, hidden16), 2 * (n * E + 7 * E + 7 + 2 * n * 7)),
            "gelu_linear_grad": (  # two tiles of rows
                (branch, weight16.T, t(n, 7).to(BF16), True),
                2 * (n * E + 7 * E + 2 * n * 7 + 7) + 2 * 4 * 2 * 7,
            ),
            "nhsic": ((x, y, 5.0), 4 * m * (d + 2 * d) * 3 + 2 * 5 * 2 * 4 * m * m),
            "nhsic_grad": (
                (t(()), x, square, square, square, 5.0, torch.float32),
                4 * m * d * 2 + 3 * 4 * m * m + 5 * 2 * 4 * m * m,
            ),
        }
        prices = {name: ours(name, *arguments) for name, (arguments, _) in cases.items()}
    assert {name: found[0].bytes for name, found in prices.items()} == {
        name: count for name, (_, count) in cases.items()
    }
    assert cases.keys() == CONTRACTS.keys()
    flops = {name: found[0].flops for name, found in prices.items() if found[0].flops}
    assert flops == {
        "nhsic": {"tf32": 3 * m * m * 3 * d},
        "nhsic_grad": {"tf32": 3 * (2 * 2 * m**3 + 2 * m * m * d)},
        "short_attention": {"tf32": 4 * B * L * L * E},
        "short_attention_grad": {"tf32": 10 * B * L * L * E},
        "linear_gelu": {"bf16": 2 * n * E * 7},
        "gelu_linear_grad": {"bf16": 2 * n * E * 7},
    }
    attention, products = ("short_attention", "short_attention_grad"), ("linear_gelu", "gelu_linear_grad")
    kinds = {name: found[0].kind for name, found in prices.items() if found[0].kind != "ours"}
    assert kinds == dict.fromkeys(attention, "attention") | dict.fromkeys(products, "GEMM")
    assert sum(p.solve for p in prices["nhsic"][1:]) == pytest.approx(6 * 0.38e-3 * m / 512)


def ours(name: str, *arguments) -> list[Price]:
    """The prices of one of our operators, called without data."""
    with Recorder("cpu") as recorder:
        getattr(torch.ops.mimir_fast, name)(*arguments)
    (call,) = recorder.calls
    return price(call)


@pytest.mark.parametrize("factors", [False, True])
def test_contract_of_a_layer_norm_that_learns_nothing(factors):
    """It adds nothing, or a branch of each image by a factor of the image."""
    n, D, B = 20, 64, 4
    with FakeTensorMode():
        x, row = torch.zeros(B, n // B, D), torch.zeros(D)
        keep, delta, dtype = (torch.zeros(B), x, torch.float32) if factors else (None, None, None)
        s, out, statistics = torch.ops.mimir_fast.add_layer_norm(x, delta, None, row, row, 1e-6, BF16, keep)
        (forward,) = ours("add_layer_norm", x, delta, None, row, row, 1e-6, BF16, keep)
        ds, total = (s, s) if factors else (None, x)
        (backward,) = ours("add_layer_norm_grad", ds, out, total, statistics, row, dtype, False, None, keep)
    assert forward.bytes == n * (D * (4 + 2 + factors * (4 + 4)) + 8) + 2 * 4 * D + factors * 4 * B
    # the gradient of delta is one of its own
    assert backward.bytes == n * (D * (2 + 4 + 4 + factors * (4 + 4)) + 8) + 4 * D + factors * 4 * B


def test_what_has_no_price_is_named():
    part = Spec((4,), "float32", 16)
    new = price(Call("op", "mimir_fast.something_new.default", {"x": [part]}, [part]))[0]
    assert (new.kind, new.bytes) == ("ours", 32)
    assert "no contract" in new.why
    kernel = price(Call("inductor", "triton_poi_0", {"arguments": [part, part]}))[0]
    assert (kernel.kind, kernel.bytes) == ("Inductor", 32)
    assert "no byte count" in kernel.why
    counted = price(Call("inductor", "triton_poi_0", {"arguments": [part]}, gb=2.0))[0]
    assert (counted.bytes, counted.why) == (2e9, "")
    template = price(Call("inductor", "triton_tem_0", {"arguments": [Spec((4,), "bfloat16", 8)]}, gb=1.0, flops=3))
    assert (template[0].kind, template[0].flops) == ("GEMM", {"bf16": 3})
