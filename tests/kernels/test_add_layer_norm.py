"""add_layer_norm: the kernels in the interpreter against float64, and what the contract promises about traffic."""

import pytest
import torch

from mimir_fast.kernels import add_layer_norm
from mimir_fast.kernels.add_layer_norm import kernel
from tests.support.budget import assert_within_budget
from tests.support.interpreter import Sanitizer, interpret

NAMES = ("x", "delta", "delta_bias", "weight", "bias")
F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
SHAPES = [(1, 1, 7), (2, 5, 48), (1, 11, 129), (1, 3, 1280), (40, 1), (3, 2, 2, 64), (17,), (1, 19, 128)]
MIXES = {  # x, delta, weight, what comes out
    "fp32": (F32, F32, F32, None),
    "fp16": (F16, F16, F16, None),
    "bf16": (BF16, BF16, F32, None),
    "fp32 residual, bf16": (F32, BF16, F32, None),
    "bf16 residual, fp32": (BF16, F32, BF16, F16),
    "fp32 residual, fp16, fp32 out": (F32, F16, F32, F32),
}


def inputs(shape, mix="fp32"):
    """x, delta, delta_bias, weight, bias, and the type that comes out; a stream that is not centred."""
    residual, compute, parameter, out_dtype = MIXES[mix]
    D = shape[-1]
    x, delta = (torch.randn(shape) + 0.5).to(residual), torch.randn(shape).to(compute)
    weight, bias = (torch.randn(D) + 1).to(parameter), torch.randn(D).to(parameter)
    return [x, delta, torch.randn(D).to(compute), weight, bias], out_dtype


def outputs_and_gradients(tensors, out_dtype, impl, upstream, eps=1e-6, keep=None):
    """Sum, normalised sum and the gradient of every tensor that is there, by name; upstream None: that output is not used."""
    leaves = {n: t if t is None else t.detach().requires_grad_() for n, t in zip(NAMES, tensors)}
    outs = dict(zip(("s", "n"), add_layer_norm(*leaves.values(), eps, out_dtype, impl, keep)))
    seeds = {n: u.to(outs[n].dtype) for n, u in zip(outs, upstream) if u is not None}
    there = {n: t for n, t in leaves.items() if t is not None}
    grads = torch.autograd.grad([outs[n] for n in seeds], list(there.values()), list(seeds.values()))
    return {n: t.detach() for n, t in outs.items()} | {f"grad {n}": g for n, g in zip(there, grads)}


def check(tensors, out_dtype, upstream, eps=1e-6, keep=None):
    """Bitwise repeatable, of eager's types, within the budget."""
    upstream = [u if u is None else u.to(o) for u, o in zip(upstream, (tensors[0].dtype, out_dtype or F32))]
    exact = [t if t is None else t.double() for t in tensors]
    truth = outputs_and_gradients(exact, torch.float64, "reference", upstream, eps, keep)
    eager = outputs_and_gradients(tensors, out_dtype, "reference", upstream, eps, keep)
    with interpret(Sanitizer()) as s:
        ours = outputs_and_gradients(tensors, out_dtype, "triton", upstream, eps, keep)
        again = outputs_and_gradients(tensors, out_dtype, "triton", upstream, eps, keep)
    assert not s.errors
    assert ours.keys() == eager.keys()
    for name, value in ours.items():
        assert value.dtype == eager[name].dtype, name
        assert torch.equal(value, again[name]), name
        assert_within_budget(value, eager[name], truth[name], name)


CASES = [(shape, mix) for shape in SHAPES for mix in ("fp32", "fp32 residual, bf16")]


@pytest.mark.parametrize(("shape", "mix"), [*CASES, *(((2, 9, 33), mix) for mix in MIXES)], ids=str)
def test_values_and_gradients(shape, mix):
    tensors, out_dtype = inputs(shape, mix)
    dtype = out_dtype or tensors[1].dtype
    check(tensors, dtype, (torch.randn(shape), torch.randn(shape)))


@pytest.mark.parametrize("mix", ["fp32", "bf16", "fp32 residual, bf16"])
@pytest.mark.parametrize("shape", [(3, 13, 33), (5, 48), (4, 2, 3, 16), (1, 19, 128)], ids=str)
def test_factors_of_the_images(shape, mix):
    tensors, out_dtype = inputs(shape, mix)
    keep = torch.tensor([1.25, 0.0, 1.0, 0.0, 2.0])[: shape[0]]
    check(tensors, out_dtype or tensors[1].dtype, (torch.randn(shape), torch.randn(shape)), keep=keep)
    tensors[2] = None  # without delta_bias
    check(tensors, out_dtype or tensors[1].dtype, (torch.randn(shape), torch.randn(shape)), keep=keep)


def test_an_image_left_out_gets_nothing_and_gives_nothing():
    (x, delta, *rest), _ = inputs((3, 7, 32), "bf16")
    x, delta = x[:, 2:].requires_grad_(), delta[:, 2:].requires_grad_()  # strided
    with interpret(Sanitizer()) as s:
        outs = add_layer_norm(x, delta, *rest, impl="triton", keep_B=torch.tensor([1.0, 0.0, 1.0]))
        plain = add_layer_norm(x, delta, *rest, impl="triton")
        dx, d_delta = torch.autograd.grad(outs, (x, delta), [torch.randn_like(t) for t in outs])
    assert not s.errors
    assert torch.equal(outs[0][1], x[1])
    assert torch.equal(d_delta[1], torch.zeros_like(d_delta[1]))
    for image in (0, 2):
        assert torch.equal(outs[0][image], plain[0][image])
        assert torch.equal(d_delta[image], dx[image])


@pytest.mark.parametrize("mix", ["fp32", "bf16", "fp32 residual, bf16"])
@pytest.mark.parametrize("without", ["delta", "delta_bias", "ds", "dn", "delta and ds"])
def test_without(without, mix):
    (x, delta, delta_bias, weight, bias), out_dtype = inputs((3, 13, 33), mix)
    out_dtype, upstream = out_dtype or delta.dtype, [torch.randn(3, 13, 33), torch.randn(3, 13, 33)]
    if "delta" in without:
        delta, delta_bias = (delta, None) if without == "delta_bias" else (None, None)
    if without == "dn":  # no gradient reaches the parameters
        weight, bias = (t.detach() for t in (weight, bias))
        leaves = [t.requires_grad_() for t in (x, delta, delta_bias)]
        with interpret(Sanitizer()) as s:
            total, _ = add_layer_norm(*leaves, weight, bias, impl="triton")
            grads = torch.autograd.grad(total, leaves, upstream[0].to(x.dtype))
        assert not s.errors
        expected = upstream[0].to(x.dtype)
        assert torch.equal(grads[0], expected)
        assert torch.equal(grads[1], expected.to(delta.dtype))
        bound = {F32: 1e-5, BF16: 0.05}[delta.dtype]
        torch.testing.assert_close(grads[2].float(), expected.float().sum((0, 1)), atol=bound, rtol=bound)
        return
    check([x, delta, delta_bias, weight, bias], out_dtype, [None if "ds" in without else upstream[0], upstream[1]])


@pytest.mark.parametrize("delta", [True, False], ids=["delta", "no delta"])
@pytest.mark.parametrize(
    "view", ["from the third token", "sliced", "transposed", "expanded", "expanded gradients", "rows"]
)
def test_strided_inputs(view, delta):
    tensors, _ = inputs((3, 10, 16))
    upstream = [torch.randn(3, 10, 16), torch.randn(3, 10, 16)]
    if view == "expanded gradients":
        upstream = [u[:1, :1, :1].expand(3, 10, 16) for u in upstream]
    elif view == "rows":
        tensors[0], tensors[1], upstream = (
            torch.randn(30, 48)[:, 16:32],
            torch.randn(30, 32)[:, :16],
            torch.randn(2, 30, 16),
        )
    else:
        tensors[0] = {
            "from the third token": torch.randn(3, 12, 16)[:, 2:],
            "sliced": torch.randn(3, 21, 48)[:, 1::2, 8:24],
            "transposed": tensors[0].mT.contiguous().mT,
            "expanded": tensors[0][:, :1].expand(3, 10, 16),
        }[view]
    if not delta:
        tensors[1:3] = None, None
    check(tensors, F32, upstream)


def test_rows_are_not_copied_and_without_delta_the_sum_is_x():
    tensors, _ = inputs((2, 9, 32))
    x = torch.randn(2, 12, 32)[:, 3:]
    with interpret(Sanitizer()) as s:
        total, _ = add_layer_norm(x, *tensors[1:], impl="triton")
        assert kernel._rows_of(x) is x
        assert s.st["load_bytes"] == 2 * x.nbytes + 3 * 32 * 4  # one program, three parameters
        same, _ = add_layer_norm(x, None, None, *tensors[3:], impl="triton")
    assert same is x
    assert add_layer_norm(x, None, None, *tensors[3:])[0] is x
    assert total.is_contiguous()


@pytest.mark.parametrize("eps", [1e-6, 0.1])
def test_rows_without_variance(eps):
    """Constant rows, of which 0 is one, between others: h is 0 where eps is all that there is."""
    tensors, _ = inputs((4, 5, 24))
    tensors[0][1], tensors[0][2, 3], tensors[1][1:3], tensors[2][:] = 0, 0.25, 0, 0
    check(tensors, F32, (torch.randn(4, 5, 24), torch.randn(4, 5, 24) * (1e-3 if eps < 0.1 else 1)), eps)


def test_what_is_normalised_is_the_sum_as_stored():
    """Around 300 a bf16 number is even: what was added shows up rounded, in the forward and in the backward pass."""
    tensors, _ = inputs((6, 40), "bf16")
    tensors[0][:] = 300
    upstream = torch.randn(6, 40), torch.randn(6, 40)
    eager = outputs_and_gradients(tensors, F32, "reference", upstream)
    with interpret():
        ours = outputs_and_gradients(tensors, F32, "triton", upstream)
    assert (eager["s"] % 2 == 0).all()
    for name in ("s", "n", "grad weight"):
        torch.testing.assert_close(ours[name], eager[name], atol=1e-4, rtol=1e-4)


def test_many_groups_of_rows():
    """More rows than programs take in one tile each, and a last tile that is not full: every row counts once."""
    rows = 16 * 5 + 3
    tensors, _ = inputs((rows, 200))
    assert kernel.groups(rows, 200, True) == 6
    check(tensors, F32, (torch.randn(rows, 200), torch.randn(rows, 200)))


def test_groups_depend_on_the_shape_alone():
    assert kernel.groups(512 * 50, 768, False) == 132 * 8
    assert kernel.groups(512 * 50, 768, True) == 132 * 5
    assert kernel.groups(512 * 50, 1280, True) == 132 * 2
    assert kernel.groups(512 * 50, 2**15, True) == 132
    assert kernel.groups(17, 768, True) == 2
    assert kernel.groups(65, 16, True) == 2  # a tile has 64 rows


def test_permuting_the_rows_permutes_sums_and_gradients():
    tensors, _ = inputs((20, 40))
    upstream, order = [torch.randn(20, 40), torch.randn(20, 40)], torch.randperm(20)
    moved = [tensors[0][order], tensors[1][order], *tensors[2:]]
    with interpret():
        ours = outputs_and_gradients(tensors, F32, "triton", upstream)
        others = outputs_and_gradients(moved, F32, "triton", [u[order] for u in upstream])
    for name in ("s", "n", "grad x", "grad delta"):
        assert torch.equal(ours[name][order], others[name]), name
    for name in ("grad delta_bias", "grad weight", "grad bias"):
        torch.testing.assert_close(ours[name], others[name])


@pytest.mark.parametrize("mix", ["fp32", "bf16", "fp32 residual, bf16"])
@pytest.mark.parametrize("D", [128, 384])
def test_traffic_is_the_contracts(D, mix):
    """Besides, every program reads the parameters once, from cache; all in all not a tenth."""
    rows, programs = 80, 5
    tensors, _ = inputs((rows, D), mix)
    x, delta, delta_bias, weight, _ = leaves = [t.requires_grad_() for t in tensors]
    parameters, copied = 2 * weight.nbytes + delta_bias.nbytes, delta.nbytes if delta.dtype != x.dtype else 0
    with interpret(Sanitizer()) as s:
        outs = add_layer_norm(*leaves, impl="triton")
        assert outs[1].dtype == delta.dtype
        rest = (programs - 1) * parameters
        check_traffic(s, x.nbytes + delta.nbytes + parameters, sum(t.nbytes for t in outs) + 8 * rows, rest)
        s.st.clear()
        torch.autograd.backward(outs, [torch.randn_like(t) for t in outs])
        assert s.launches == {"_add_norm_kernel": 1, "_add_norm_grad_kernel": 1, "_add_partials_kernel": 1}
    partials, rest = 3 * 4 * programs * D, (programs - 1) * weight.nbytes
    read = x.nbytes + sum(t.nbytes for t in outs) + 8 * rows + weight.nbytes + partials
    check_traffic(s, read, x.nbytes + copied + parameters + partials, rest)


def check_traffic(s, read, written, again):
    assert s.st["load_bytes"] == read + again
    assert s.st["store_bytes"] == written
    assert again < 0.1 * (read + written)
    assert s.used("load") > 0.9
    assert s.used("store") > 0.9


def test_a_frozen_layer_has_no_column_sums():
    tensors, _ = inputs((2, 9, 48), "fp32 residual, bf16")
    x, delta = (t.requires_grad_() for t in tensors[:2])
    with interpret(Sanitizer()) as s:
        outs = add_layer_norm(*tensors, impl="triton")
        torch.autograd.backward(outs, [torch.randn_like(t) for t in outs])
        written = s.st["store_bytes"]
    assert s.launches == {"_add_norm_kernel": 1, "_add_norm_grad_kernel": 1}
    assert written == 2 * (x.nbytes + delta.nbytes) + 8 * 18
    assert torch.equal(delta.grad, x.grad.bfloat16())


def test_row_offsets_past_the_range_of_32_bits():
    """The last of programs with sixteen rows each, the last row among them; of the tensors nothing else is ever touched."""
    D, tail = 1024, 1
    rows = 2**31 // D + 32
    (x, delta, delta_bias, weight, bias), _ = inputs((tail, D), "bf16")
    upstream = torch.randn(2, tail, D).to(BF16)
    torch.utils.deterministic.fill_uninitialized_memory = False  # 4 GiB of addresses each
    try:
        many = {name: torch.empty(rows, D, dtype=BF16) for name in ("x", "delta", "s", "n", "ds", "dn", "dx")}
        statistics = torch.empty(2, rows)
    finally:
        torch.utils.deterministic.fill_uninitialized_memory = True
    for name, value in {"x": x, "delta": delta, "ds": upstream[0], "dn": upstream[1]}.items():
        many[name][-tail:] = value
    m, flags = many, {"D": D, "num_warps": 4}
    with interpret(last=1):
        stream = (
            m["x"],
            m["delta"],
            delta_bias,
            None,
            weight,
            bias,
            m["s"],
            m["n"],
            statistics,
            rows,
            rows,
            0,
            D,
            1e-6,
        )
        kernel._add_norm_kernel[(rows // 16,)](*stream, **flags)
        stream = (m["ds"], m["dn"], m["s"], statistics, weight, None, m["dx"], None, torch.empty(0), rows, rows)
        kernel._add_norm_grad_kernel[(rows // 16,)](*stream, OF_NORM=False, OF_DELTA_BIAS=False, **flags)
    truth = outputs_and_gradients([x, delta, delta_bias, weight, bias], BF16, "reference", upstream)
    for name, value in (("s", "s"), ("n", "n"), ("dx", "grad x")):
        torch.testing.assert_close(many[name][-1].float(), truth[value][-1].float(), atol=0.05, rtol=0.02)


def test_operator_registration_and_fullgraph_compilation():
    tensors, _ = inputs((2, 5, 24), "fp32 residual, bf16")
    leaves = [t.requires_grad_() for t in tensors]
    upstream = torch.randn(2, 5, 24), torch.randn(2, 5, 24).bfloat16()

    def normed(*leaves):
        total, out = add_layer_norm(*leaves, impl="triton")
        return total * 2, out * 2

    with interpret():
        torch.library.opcheck(kernel.add_layer_norm, (*leaves, 1e-6, BF16, None))
        plain = (leaves[0], None, None, *leaves[3:], 1e-6, BF16, None)
        torch.library.opcheck(kernel.add_layer_norm, plain)
        torch.library.opcheck(kernel.add_layer_norm, (*leaves, 1e-6, BF16, torch.rand(2)))
        rest = (torch.randn(2, 5, 24), torch.rand(2, 10), torch.randn(24))
        torch.library.opcheck(kernel.add_layer_norm_grad, (*upstream, *rest, BF16, True, BF16, None))
        torch.library.opcheck(kernel.add_layer_norm_grad, (None, upstream[1], *rest, None, False, None, None))
        torch.library.opcheck(kernel.add_layer_norm_grad, (*upstream, *rest, BF16, True, BF16, torch.rand(2)))
        eager = normed(*leaves)
        compiled = torch.compile(normed, fullgraph=True, backend="aot_eager")(*leaves)
        assert all(map(torch.equal, eager, compiled))
        grads = [torch.autograd.grad(outs, leaves, upstream) for outs in (eager, compiled)]
        assert all(map(torch.equal, *grads))


@pytest.mark.parametrize("impl", ["triton", "reference"])
@pytest.mark.parametrize("mix", ["fp32", "fp32 residual, bf16", "bf16"])
def test_autocast_decides_what_comes_out_and_nothing_else(mix, impl):
    torch._dynamo.reset()
    tensors, _ = inputs((2, 5, 24), mix)
    with interpret():
        expected = add_layer_norm(*tensors, out_dtype=F16, impl=impl)
        for function in (add_layer_norm, torch.compile(add_layer_norm, fullgraph=True, backend="aot_eager")):
            with torch.autocast("cpu", F16):
                found = function(*tensors, impl=impl)
                given = function(*tensors, out_dtype=F32, impl=impl)
            assert all(map(torch.equal, found, expected))
            assert (found[0].dtype, found[1].dtype, given[1].dtype) == (tensors[0].dtype, F16, F32)


def test_the_reference_is_torchs_layer_norm_and_passes_gradcheck():
    tensors, _ = inputs((3, 4, 10))
    x, delta, delta_bias, weight, bias = tensors
    total, out = add_layer_norm(*tensors)
    assert torch.equal(total, x + (delta + delta_bias))
    assert torch.equal(out, torch.nn.functional.layer_norm(total, (10,), weight, bias, 1e-6))
    assert torch.equal(add_layer_norm(x, None, None, weight, bias)[1], torch.layer_norm(x, (10,), weight, bias, 1e-6))
    # Few numbers: gradcheck moves each by itself.
    leaves = [t.double().requires_grad_() for t in inputs((3, 2, 4))[0]]
    assert torch.autograd.gradcheck(add_layer_norm, leaves)
    keep = torch.tensor([0.0, 1.5, 1.0], dtype=torch.float64)
    assert torch.equal(add_layer_norm(*tensors, keep_B=keep)[0], x + (delta + delta_bias) * keep.float()[:, None, None])
    assert torch.autograd.gradcheck(lambda *t: add_layer_norm(*t, keep_B=keep), leaves)
    assert torch.autograd.gradcheck(lambda x, w, b: add_layer_norm(x, None, None, w, b), [leaves[0], *leaves[3:]])


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"x": torch.zeros(2, 5, 8, dtype=torch.int32)}, "x"),
        ({"x": torch.zeros(0, 8)}, "x"),
        ({"x": torch.randn(2, 5, 8).double(), "impl": "triton"}, "x"),
        ({"delta": torch.randn(2, 4, 8)}, "delta"),
        ({"delta": torch.randn(2, 5, 8).double(), "impl": "triton"}, "delta"),
        ({"delta": torch.zeros(2, 5, 8, device="meta"), "impl": "triton"}, "delta"),
        ({"delta": None}, "delta_bias"),
        ({"delta_bias_D": torch.randn(2, 5, 8)}, "delta_bias"),
        ({"weight_D": torch.randn(1, 8)}, "weight"),
        ({"bias_D": torch.randn(7)}, "bias"),
        ({"out_dtype": torch.int64}, "out_dtype"),
        ({"out_dtype": torch.float64, "impl": "triton"}, "out_dtype"),
        ({"impl": "cuda"}, "impl"),
        ({"keep_B": torch.ones(5)}, "keep"),
        ({"keep_B": torch.ones(2).requires_grad_()}, "keep"),
        ({"keep_B": torch.ones(2), "delta": None, "delta_bias_D": None}, "keep"),
        ({"keep_B": torch.ones(2, dtype=torch.int64)}, "keep"),
    ],
)
def test_errors_name_the_argument(change, word):
    arguments = dict(zip(("x", "delta", "delta_bias_D", "weight_D", "bias_D"), inputs((2, 5, 8))[0]))
    with pytest.raises(ValueError, match=f"^{word}:"):
        add_layer_norm(**(arguments | change))
