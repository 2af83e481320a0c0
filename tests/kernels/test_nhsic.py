"""nhsic: the kernels in the interpreter against float64, and what the contract promises."""

import pytest
import torch
import triton

from mimir_fast.kernels import nhsic, ridge_inverse
from mimir_fast.kernels.nhsic import gram, kernel, reference
from tests.support.golden import load_golden, relative_error
from tests.support.interpreter import Sanitizer, interpret

SHAPES = [(1, 7, 5), (2, 1, 3), (5, 7, 9), (33, 50, 130), (65, 200, 96)]  # m, dx, dy


def value_and_gradients(x, y, impl):
    x, y = x.detach().requires_grad_(), y.detach().requires_grad_()
    value = nhsic(x, y, impl=impl)
    return value.detach(), *torch.autograd.grad(1.3 * value, (x, y))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_value_and_gradients(shape, dtype):
    m, dx, dy = shape
    x = torch.rand(m, dx)
    y = (torch.randn(m, dy) + 3 * x[:, :1]).to(dtype)
    x = x.to(dtype)
    truth = value_and_gradients(x.double(), y.double(), "reference")
    with interpret(Sanitizer()) as s:
        ours = value_and_gradients(x, y, "triton")
    assert not s.errors
    assert ours[0].dtype == torch.float32
    assert abs(ours[0] - truth[0]) <= 1e-6 * (1 + truth[0])
    for name, gradient, exact in zip("xy", ours[1:], truth[1:]):
        assert gradient.dtype == dtype
        rounding = torch.finfo(dtype).eps * exact.abs() + torch.finfo(dtype).tiny * torch.finfo(dtype).eps
        error = (gradient.double() - exact).abs()
        assert (error <= rounding + 5e-5 * exact.norm(dim=1, keepdim=True)).all(), (
            name
        )  # row by row: a dead row is seen


@pytest.mark.parametrize("name", ["hsic_gauss", "hsic_latent_like", "hsic_offset"])
def test_recorded_truth(name):
    tensors, record = load_golden(name)
    x, y = (tensors[k].float().requires_grad_() for k in "xy")
    with interpret(Sanitizer()) as s:
        value = nhsic(x, y, sigma=record["sigma"], impl="triton")
        grad_x, grad_y = torch.autograd.grad(value, (x, y))
    assert not s.errors
    assert value.item() == pytest.approx(tensors["value64"].item(), rel=1e-6)
    assert relative_error(grad_x, tensors["grad_x64"]) < 1e-4
    assert relative_error(grad_y, tensors["grad_y64"]) < 1e-4


def test_repeats_bitwise_and_strides_do_not_matter():
    x, y = torch.rand(33, 70), torch.randn(33, 40)
    with interpret():
        first = value_and_gradients(x, y, "triton")
        again = value_and_gradients(x.T.contiguous().T, torch.cat([y, y], 1)[:, :40], "triton")
    assert all(torch.equal(a, b) for a, b in zip(first, again))


def test_only_the_gradients_asked_for():
    x, y = torch.rand(5, 7), torch.rand(5, 9, requires_grad=True)
    with interpret(), torch.autocast("cpu", torch.bfloat16):
        nhsic(x, y, impl="triton").backward()
    expected = value_and_gradients(x.double(), y.double(), "reference")[2] / 1.3
    assert relative_error(y.grad, expected) < 1e-4


@pytest.mark.parametrize("impl", ["triton", "reference"])
def test_a_side_that_is_computed_before_the_other(impl):
    """Bit for bit, with the other side's gradient."""
    x, y = torch.randn(33, 50, requires_grad=True), torch.rand(33, 40)
    with interpret():
        values = [nhsic(x, y, impl=impl), nhsic(x, ridge_inverse(y, impl=impl))]
        gradients = [torch.autograd.grad(1.3 * value, x)[0] for value in values]
    assert torch.equal(*values)
    assert torch.equal(*gradients)
    with pytest.raises(ValueError, match=r"y: expected 32 rows"):
        nhsic(x[:32], ridge_inverse(y))
    with pytest.raises(ValueError, match="sigma"):
        ridge_inverse(y, -1.0)


def test_a_failed_factorisation_is_nan_without_an_exception():
    x = torch.rand(5, 7, requires_grad=True)
    with interpret():
        value = nhsic(x, torch.full((5, 3), torch.nan), impl="triton")
        value.backward()
    assert value.isnan()
    assert x.grad.isnan().all()


def test_gaussian_gram_is_exactly_symmetric_and_split():
    x = torch.rand(70, 1000) + 100  # an offset that would ruin an uncentred product
    assert gram._split(70, 1000)[0] > 3
    with interpret(Sanitizer()) as s:
        shift, k = gram.gaussian_gram(x, 5.0)
    assert not s.errors
    assert torch.equal(k, k.T)
    assert (k.diagonal() == 0).all()
    exact = reference.kernel_matrix(reference.center_rows(x.double()), 5.0, "gaussian") - 1
    assert relative_error(k, exact) < 1e-6
    assert relative_error(shift, x[:16].double().mean(0)) < 1e-6


def test_traffic_is_the_contracts():
    m, d = 128, 512
    x = torch.rand(m, d)
    with interpret(Sanitizer()) as s:
        gram.gaussian_gram(x, 5.0)
    tiles, parts = triton.cdiv(m, gram.GRAM["BLOCK_M"]), gram._split(m, d)[0]
    pairs = tiles * (tiles + 1) // 2
    partial = pairs * gram.GRAM["BLOCK_M"] ** 2 * 4 * parts
    blocks = triton.cdiv(m, gram.GAUSSIAN["BLOCK_M"])
    norms = 4 * m * parts
    read = 16 * 4 * d + pairs * (2 * x.nbytes / tiles + 4 * d) + partial + norms * (blocks + 1)
    assert s.st["load_bytes"] < 1.1 * read
    assert s.st["store_bytes"] < 1.1 * (4 * d + partial + norms + m * m * 4)
    assert s.used("store") > 0.9
    assert s.used("load") > 0.9
    assert s.st["dot_flops"] == 2 * pairs * gram.GRAM["BLOCK_M"] ** 2 * d


def test_traffic_of_the_backward_is_the_contracts():
    m, d = 128, 512
    rows = torch.rand(m, d)
    k, p_self, p_other = (torch.rand(m, m) for _ in range(3))
    with interpret(Sanitizer()) as s:
        kernel.nhsic_backward(torch.tensor(1.0), rows, torch.rand(d), k, p_self, p_other, 5.0)
    tiles, square = triton.cdiv(m, kernel.MATMUL["BLOCK_M"]), 4 * m * m
    products = 2 * 2 * tiles * square + tiles * rows.nbytes + triton.cdiv(d, kernel.MATMUL["BLOCK_N"]) * square
    assert s.st["load_bytes"] < 1.1 * (products + 2 * square)
    assert s.st["store_bytes"] < 1.1 * (3 * square + rows.nbytes)
    assert s.used("load") > 0.9
    assert s.used("store") > 0.9


def test_traffic_of_the_value_is_the_contracts():
    m = 128
    means, k = torch.rand(m), torch.rand(m, m)
    centred, values = torch.empty(m, m), torch.empty(m)
    with interpret(Sanitizer()) as s:
        kernel._double_center_kernel[(m,)](k, means, centred, m, 0.1, BLOCK=m, num_warps=4)
        kernel._value_kernel[(m,)](centred, k, values, m, 0.1, BLOCK=m, num_warps=4)
    assert s.st["load_bytes"] < 1.1 * (3 * k.nbytes + m * means.nbytes)
    assert s.st["store_bytes"] == k.nbytes + means.nbytes
    assert s.used("load") > 0.9


def test_more_rows_than_the_kernels_take():
    rows = torch.empty(8193, 1)
    with pytest.raises(ValueError, match=r"x: .* up to 8192 rows"):
        nhsic(rows, rows, impl="triton")


def test_operator_registration_and_fullgraph_compilation():
    x, y = torch.randn(5, 7, requires_grad=True), torch.randn(5, 9, requires_grad=True)
    with interpret():
        torch.library.opcheck(kernel.nhsic, (x, y, 5.0))
        compiled = torch.compile(lambda x, y: nhsic(x, y, impl="triton") * 2, fullgraph=True, backend="aot_eager")
        grads = torch.autograd.grad(compiled(x, y), (x, y))
        expected = torch.autograd.grad(nhsic(x, y, impl="triton") * 2, (x, y))
    assert all(torch.equal(a, b) for a, b in zip(grads, expected))


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"kernel_y": "linear", "impl": "triton"}, "kernel_y"),
        ({"x": torch.rand(5, 7, dtype=torch.float64), "impl": "triton"}, "x"),
        ({"y": torch.rand(4, 9)}, "y"),
        ({"sigma": 0.0}, "sigma"),
        ({"impl": "gpu"}, "impl"),
    ],
)
def test_errors_name_the_argument(change, word):
    arguments = {"x": torch.rand(5, 7), "y": torch.rand(5, 9), "sigma": 5.0, "kernel_y": "gaussian", "impl": "auto"}
    with pytest.raises(ValueError, match=f"^{word}"):
        nhsic(*(arguments | change).values())
