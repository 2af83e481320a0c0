"""Prices of operations against hand-counted cases, and what is recorded of a step."""

from itertools import chain

import pytest
import torch
from torch._inductor.runtime.triton_heuristics import CachingAutotuner

from bench.peaks import PEAKS, peak_of
from bench.step.prices import Price, price, price_inductor, price_ours
from bench.step.trace import record
from bench.steps import ConvolutionStandIn
from mimir_fast.kernels._shared.cost import Cost

H100, BF16 = PEAKS["h100"], torch.bfloat16
x, y, out = torch.zeros(10, 6), torch.zeros(1, 6), torch.zeros(10, 6)
a, b, bias = torch.zeros(3, 5, dtype=BF16), torch.zeros(5, 7, dtype=BF16), torch.zeros(7, dtype=BF16)
FACTORS, PRODUCT = 2 * (3 * 5 + 5 * 7 + 3 * 7), {"bf16": 2 * 3 * 5 * 7}


def priced(function) -> list[Price]:
    """Prices of what a function runs on the CPU."""
    return [*chain(*record(function, "cpu"))]


@pytest.mark.parametrize(
    ("name", "function", "kind", "count", "flops"),
    [
        ("mm", lambda: a @ b, "GEMM", FACTORS, PRODUCT),
        # the expanded bias is seven numbers
        ("addmm", lambda: torch.addmm(bias.expand(3, 7), a, b), "GEMM", FACTORS + 2 * 7, PRODUCT),
        ("bmm", lambda: torch.bmm(x.view(2, 5, 6), x.view(2, 6, 5)), "GEMM", 4 * 170, {"fp32": 2 * 2 * 5 * 6 * 5}),
        ("add", lambda: x + y.expand(10, 6), "other ATen", 4 * (60 + 6 + 60), {}),
        ("add_", lambda: x.add_(1), "other ATen", 4 * (60 + 60), {}),  # read and written
        ("mul", lambda: torch.mul(x, y, out=out), "other ATen", 4 * (60 + 6 + 60), {}),  # out is not read
        ("copy_", lambda: out.copy_(x), "copies", 4 * (60 + 60), {}),
        ("_foreach_copy_", lambda: torch._foreach_copy_([out], [x]), "other ATen", 4 * (60 + 60), {}),
        ("fill_", lambda: out.fill_(1), "copies", 4 * 60, {}),
        ("cat", lambda: torch.cat([x, x]), "copies", 4 * (120 + 120), {}),
        ("_to_copy", lambda: x.bfloat16(), "copies", 60 * (4 + 2), {}),
        ("sum", lambda: x.sum(), "other ATen", 4 * (60 + 1), {}),
        ("gather", lambda: x.gather(0, torch.zeros(2, 6).long()), "other ATen", 12 * (4 + 8 + 4), {}),
        ("_foreach_mul_", lambda: torch._foreach_mul_([x, out], 2.0), "other ATen", 4 * 4 * 60, {}),
    ],
)
def test_operations_of_aten(name, function, kind, count, flops):
    last = priced(function)[-1]
    assert last.name.split(".")[1] == name
    assert (last.kind, last.bytes, last.flops) == (kind, count, flops)


def test_views_empty_memory_and_other_devices_cost_nothing():
    assert (
        priced(lambda: (x.view(6, 10).t()[1:], y.expand(2, 4, 6), x.detach(), torch.empty(3), torch.empty_like(x)))
        == []
    )
    assert record(lambda: x + 1, "cuda") == []


def test_attention_adamw_and_solves():
    B, N, T, d = 2, 3, 5, 8
    q, sums = torch.zeros(B, N, T, d, dtype=BF16), torch.zeros(B, N, T)
    reads, flops = {name: [q] for name in ("query", "key", "value")}, 4 * B * N * T * T * d
    p = price("aten._scaled_dot_product_flash_attention.default", reads, [q, sums], flops)
    assert (p.kind, p.flops, p.bytes) == ("attention", {"bf16": flops}, 4 * q.nbytes + sums.nbytes)
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
    ours, library = (
        Price("GEMM", name, 0, {"bf16": 989e12}) for name in ("mimir_fast.linear_gelu.default", "aten.mm.out")
    )
    assert [p.seconds(H100, H100.reached) for p in (ours, library)] == [1 / 0.5, 1 / 0.6]
    own, *solves = price_ours("mimir_fast.nhsic.default", Cost(5, {"tf32": 3}, [("cholesky_inverse", 256)]))
    assert (own.kind, own.bytes, own.flops) == ("ours", 5, {"tf32": 3})
    assert [(p.kind, p.bytes, p.solve) for p in solves] == [("solves", 0, pytest.approx(0.38e-3))]


def test_convolution_and_its_stand_in(monkeypatch):
    images, weight, bias = torch.zeros(2, 3, 8, 8), torch.zeros(5, 3, 4, 4), torch.zeros(5)
    marks = []
    monkeypatch.setattr("bench.steps.marker", lambda: marks.append)

    def both():
        w, b, x = (t.clone().requires_grad_() for t in (weight, bias, images))
        torch.nn.functional.conv2d(x, w, b, stride=4).sum().backward()

    once = 2 * (2 * 5 * 2 * 2) * (3 * 4 * 4)
    real = [p.flops for p in priced(both) if p.kind == "GEMM"]
    assert real == [{"fp32": once}, {"fp32": 2 * once}]
    with ConvolutionStandIn():
        assert [p.flops for p in priced(both) if p.kind == "GEMM"] == real
    assert marks == ["product"] * 3


def test_inductor_launches_are_recorded(monkeypatch):
    launched, marks = [], []
    monkeypatch.setattr(CachingAutotuner, "run", lambda self, *args, **kwargs: launched.append(args))
    kernel = object.__new__(CachingAutotuner)
    kernel.inductor_meta = {"kernel_num_gb": 1.5}
    kernel.fn = type("Source", (), {"__name__": "triton_red_fused_7", "fn": None})()  # as Inductor's cache returns it
    ((add,), (own,)) = record(lambda: (y + 1, kernel.run(y, 3, stream=0)), "cpu", marks.append)
    assert add.name == "aten.add.Tensor"
    assert own == Price("Inductor", "triton_red_fused_7", 1.5e9)
    assert (marks, len(launched)) == ([0, -1, 1, -1], 1)
    assert price_inductor("triton_tem_0", [a], 1.0, 3) == Price("GEMM", "triton_tem_0", 1e9, {"bf16": 3})
    unknown = price_inductor("triton_poi_0", [y, y], None, 0)
    assert (unknown.bytes, unknown.why) == (2 * 24, "Inductor gives no byte count, arguments once")


def test_compiled_code_stays_compiled_while_recorded():
    runs = []

    def backend(graph, _):
        return lambda *inputs: runs.append(1) or graph(*inputs)

    compiled = torch.compile(lambda x: x.sin() + 1, backend=backend)
    compiled(y)
    assert [p.name.split(".")[1] for p in priced(lambda: compiled(y))] == ["sin", "add"]
    assert len(runs) == 2


def test_bound_is_the_slower_of_arithmetic_and_memory():
    assert Price("GEMM", "", 3.35e12, {"bf16": 1.0}).seconds(H100) == 1.0
    assert Price("GEMM", "", 1.0, {"bf16": 989e12, "fp32": 67e12}).seconds(H100) == 2.0
    assert Price("solves", "", 1.0, solve=0.5).seconds(H100) == 0.5
    assert Price("GEMM", "", 2.04e12, {"bf16": 312e12 * 3}).seconds(PEAKS["a100"]) == 3.0


def test_peaks():
    assert [peak_of(peak.device) for peak in PEAKS.values()] == list(PEAKS)
    with pytest.raises(ValueError, match=r"gpu: .*RTX 3090.*--gpu"):
        peak_of("NVIDIA GeForce RTX 3090")
    assert all(p.flops["tf32"] * 2 == p.flops["bf16"] for p in PEAKS.values())
