"""Every operation on the device it is made for: on a GPU at the sizes of real runs, without one in the interpreter.

Outputs and gradients against the reference in float64, with the error budget; bitwise repeats; no host synchronisation.
"""

import pytest
import torch

from mimir_fast.kernels import (
    add_layer_norm,
    linf_bounds,
    linf_patch_step,
    linf_start,
    mask_indices,
    masked_patch_loss,
    nhsic,
    patch_gather,
    short_attention,
    token_restore,
)
from tests.support.budget import assert_within_budget
from tests.support.interpreter import interpret

NO_GPU = "no CUDA device here: the kernels run in the interpreter only"
on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason=NO_GPU)
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.fixture(params=["interpreter", pytest.param("cuda", marks=on_gpu)])
def place(request):
    """Device and sizes: images B, side, patch; decoder width E; rows m and their length d; tokens T of heads N x 16."""
    if request.param == "cuda":
        yield torch.device("cuda"), {"B": 64, "side": 224, "p": 16, "E": 128, "m": 512, "d": 38400, "T": 50}
        return
    with interpret():
        yield torch.device("cpu"), {"B": 2, "side": 24, "p": 8, "E": 32, "m": 9, "d": 70, "T": 5}


def draws(device, sizes, dtype):
    """Differentiable inputs and index tables for one batch."""
    B, side, p, E = (sizes[k] for k in ("B", "side", "p", "E"))
    L, P = (side // p) ** 2, 3 * p * p
    torch.manual_seed(1)

    def leaf(*shape):
        return torch.rand(*shape, device=device).to(dtype).requires_grad_()

    ids_shuffle, ids_restore = mask_indices(torch.rand(B, L, device=device), impl="reference")
    K = L // 4
    return {
        "images": leaf(B, 3, side, side),
        "pred": leaf(B, L - K, P),
        "tokens": leaf(B, 1 + K, E),
        "mask_token": leaf(E),
        "pos": torch.rand(1 + L, E, device=device),
        "qkv": leaf(B, sizes["T"], 3 * 2 * 16),
        "x": leaf(sizes["m"], sizes["d"]),
        "y": leaf(sizes["m"], 2 * sizes["d"]),
    }, {"all": ids_shuffle, "keep": ids_shuffle[:, :K], "removed": ids_shuffle[:, K:], "restore": ids_restore}


OPERATIONS = {
    "add_layer_norm": lambda t, ids, p, impl: add_layer_norm(
        t["tokens"], 2 * t["tokens"], t["mask_token"], t["mask_token"], t["mask_token"], impl=impl
    )[1],
    "patch_gather": lambda t, ids, p, impl: patch_gather(t["images"], ids["keep"], p, impl=impl),
    "token_restore": lambda t, ids, p, impl: token_restore(
        t["tokens"], t["mask_token"], t["pos"], ids["all"], impl=impl
    ),
    "masked_patch_loss": lambda t, ids, p, impl: masked_patch_loss(
        t["pred"], t["images"], ids["removed"], p, True, impl=impl
    ),
    "short_attention": lambda t, ids, p, impl: short_attention(t["qkv"], 2, impl=impl),
    "nhsic": lambda t, ids, p, impl: nhsic(t["x"], t["y"], impl=impl),
}


def results(operation, tensors, ids, p, impl):
    """Output and every gradient, by name, for a fixed random upstream gradient."""
    out = operation(tensors, ids, p, impl)
    upstream = torch.rand(out.shape, generator=torch.Generator().manual_seed(2)).to(out.device, out.dtype)
    leaves = {name: t for name, t in tensors.items() if t.requires_grad}
    grads = torch.autograd.grad(out, list(leaves.values()), upstream, allow_unused=True)
    found = {"out": out.detach()} | {name: g for name, g in zip(leaves, grads) if g is not None}
    return found


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", OPERATIONS)
def test_outputs_and_gradients(name, dtype, place):
    device, sizes = place
    tensors, ids = draws(device, sizes, dtype)
    double = {k: t.detach().double().requires_grad_(t.requires_grad) for k, t in tensors.items()}
    operation, p = OPERATIONS[name], sizes["p"]
    truth = results(operation, double, ids, p, "reference")
    eager = results(operation, tensors, ids, p, "reference")
    ours, again = (results(operation, tensors, ids, p, "triton") for _ in range(2))
    assert len(ours) > 1
    assert ours.keys() == truth.keys()
    for key, value in ours.items():
        assert torch.equal(value, again[key]), key
        if name == "nhsic":  # fp32 against the reference's fp64 algebra: a bound of its own
            error = (value.double() - truth[key]).norm() / truth[key].norm()
            assert error < (2e-3 if dtype == torch.float32 else 2e-2), (key, error)
        else:
            assert_within_budget(value, eager[key], truth[key], key)


def test_exact_operations(place):
    device, sizes = place
    tensors, ids = draws(device, sizes, torch.float32)
    images, B, p = tensors["images"].detach(), sizes["B"], sizes["p"]
    bounds = linf_bounds(0.03, 0.04, 0.0, 1.0, 3, device)
    noise = torch.rand(B, ids["all"].shape[1], device=device)
    start = [linf_start(images, bounds, torch.tensor(7, device=device), impl=impl) for impl in ("triton", "reference")]
    assert (start[0] - start[1]).abs().max() < 1e-6
    for mine, other in zip(*(mask_indices(noise, impl=impl) for impl in ("triton", "reference"))):
        assert torch.equal(mine, other)
    grad = torch.randn(*ids["keep"].shape, 3 * p * p, device=device)
    arguments = (images, start[0], grad, tensors["pred"].detach(), ids["restore"], bounds, p, False)
    steps = [linf_patch_step(*arguments, impl=impl) for impl in ("triton", "reference")]
    assert (steps[0] - steps[1]).abs().max() < 1e-6


def forward_and_backward(operation, tensors, ids):
    out = operation(tensors, ids, 16, "triton")
    torch.autograd.grad(out, [t for t in tensors.values() if t.requires_grad], torch.ones_like(out), allow_unused=True)


@on_gpu
@pytest.mark.parametrize("name", OPERATIONS)
def test_no_host_synchronisation(name):
    sizes = {"B": 4, "side": 64, "p": 16, "E": 128, "m": 64, "d": 512, "T": 50}
    tensors, ids = draws(torch.device("cuda"), sizes, torch.bfloat16)
    forward_and_backward(OPERATIONS[name], tensors, ids)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        forward_and_backward(OPERATIONS[name], tensors, ids)
    finally:
        torch.cuda.set_sync_debug_mode("default")
