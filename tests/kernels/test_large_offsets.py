"""Tensors of more than 2^31 elements: only the programs of the last image run, on memory of which only its pages exist."""

import pytest
import torch

from mimir_fast.kernels import (
    linf_bounds,
    linf_patch_step,
    linf_start,
    mask_indices,
    masked_patch_loss,
    patch_gather,
    token_restore,
)
from mimir_fast.kernels.masked_patch_loss import kernel as loss_kernel
from mimir_fast.kernels.nhsic import gram
from mimir_fast.kernels.nhsic import kernel as nhsic_kernel
from mimir_fast.kernels.patch_gather import kernel as gather_kernel
from mimir_fast.kernels.token_restore import kernel as restore_kernel
from tests.support.interpreter import interpret

LIMIT = 2**31
SIDE, PATCH = 32, 16
L, P = 4, 3 * PATCH**2
B = LIMIT // (9 * SIDE**2 // 4) + 3  # so that even the removed patches alone are past the limit
BOUNDS = linf_bounds(0.03, 0.04, 0.0, 1.0, 3, "cpu")
HALF = torch.bfloat16


@pytest.fixture(autouse=True)
def _untouched_memory_stays_unreal():
    torch.utils.deterministic.fill_uninitialized_memory = False
    yield
    torch.utils.deterministic.fill_uninitialized_memory = True


def with_last(value: torch.Tensor, rows: int = B) -> torch.Tensor:
    """A tensor of `rows` uninitialised rows (of indices: zeros), the last of which is `value` [1,...]."""
    make = torch.zeros if value.dtype == torch.int64 else torch.empty
    tensor = make(rows, *value.shape[1:], dtype=value.dtype)
    tensor[-1:] = value
    return tensor


def run(function, big, small):
    """The last row of the outputs on big tensors, and the outputs of the reference on the last rows alone."""
    with interpret(last=L + 1):
        ours = function(*big, impl="triton")
    theirs = function(*small, impl="reference")
    return [t if isinstance(t, tuple) else (t,) for t in (ours, theirs)]


def check(function, big, small):
    for mine, other in zip(*run(function, big, small)):
        assert torch.allclose(mine[-1:], other, rtol=1e-6, atol=0)


def test_image_operations():
    images, adv = torch.rand(2, 1, 3, SIDE, SIDE).to(HALF)
    ids_shuffle, ids_restore = mask_indices(torch.rand(1, L))
    ids_keep = ids_shuffle[:, :1]
    grad, pred = torch.randn(1, 1, P), torch.randn(1, L - 1, P).to(HALF)
    big_images, big_keep, big_restore = with_last(images), with_last(ids_keep), with_last(ids_restore)
    big_pred = with_last(pred)
    assert big_images.numel() > LIMIT < big_pred.numel()
    check(patch_gather, (big_images, big_keep, PATCH), (images, ids_keep, PATCH))
    small = (images, adv, grad, pred, ids_restore, BOUNDS, PATCH, False)
    big = (big_images, with_last(adv), with_last(grad), big_pred, big_restore, BOUNDS, PATCH, False)
    check(linf_patch_step, big, small)
    bytes_images = (255 * images).to(torch.uint8)
    check(patch_gather, (with_last(bytes_images), big_keep, PATCH), (bytes_images, ids_keep, PATCH))


def test_gradients_of_image_operations():
    images, pred = torch.rand(1, 3, SIDE, SIDE).to(HALF), torch.randn(1, L - 1, P).to(HALF)
    ids_shuffle, _ = mask_indices(torch.rand(1, L))
    ids_keep, ids_removed = ids_shuffle[:, :1], ids_shuffle[:, 1:]
    grad = torch.randn(1, 1, P).to(HALF)
    with interpret(last=L + 1):
        ours = gather_kernel.patch_gather_backward(
            with_last(grad), with_last(ids_keep), [B, 3, SIDE, SIDE], PATCH, HALF
        )
    leaf = images.clone().requires_grad_()
    patch_gather(leaf, ids_keep, PATCH).backward(grad)
    assert torch.equal(ours[-1:], leaf.grad)
    leaves = pred.clone().requires_grad_(), images.clone().requires_grad_()
    masked_patch_loss(*leaves, ids_removed, PATCH, True).backward()
    scale = torch.tensor(float(B))  # the mean runs over all images
    arguments = (scale, with_last(pred), with_last(images), with_last(ids_removed), PATCH, True)
    of_images = torch.empty(B, 3, SIDE, SIDE, dtype=HALF)
    of_images[-1:] = 0
    of_pred = arguments[1]
    launch = loss_kernel._prepared("grad_images", of_pred.shape, of_pred.stride(), HALF, of_images.shape, PATCH, True)
    with interpret(last=L + 1):
        of_pred = loss_kernel.masked_patch_loss_grad_pred(*arguments)
        launch(*arguments[:4], of_images)
    for mine, leaf in zip((of_pred, of_images), leaves):
        assert (mine[-1:].float() - leaf.grad.float()).abs().max() < 1e-2 * leaf.grad.abs().max()


def test_start():
    rows = LIMIT // SIDE + 3  # the last image's pixels lie past 2^31
    images = torch.rand(1, 1, 4, SIDE // 4).to(HALF)
    bounds, seed = BOUNDS[:, :1], torch.tensor(5)
    big = with_last(images, rows)
    with interpret(last=L + 1):
        ours = linf_start(big, bounds, seed, impl="triton")[-1]
    block = torch.arange(big.numel() - images.numel(), big.numel()) // 4
    assert block.max() * 4 > LIMIT
    from mimir_fast.kernels.linf_start.reference import LOW, UNIT, philox

    words = torch.stack(philox(seed, block[::4]), 1).flatten()
    u = torch.where(words > LOW >> 1, words ^ LOW, words).float() * UNIT
    expected = (images.float().flatten() + bounds[0] * (2 * u - 1)).clamp(0, 1).to(HALF)
    assert torch.equal(ours.flatten(), expected)


def test_token_operations():
    K, E = 1, 128
    rows = LIMIT // (5 * E) + 3
    tokens, mask_token, pos = torch.randn(1, 1 + K, E).to(HALF), torch.randn(E), torch.randn(1 + L, E).to(HALF)
    ids_shuffle, _ = mask_indices(torch.rand(1, L))
    big_shuffle = with_last(ids_shuffle, rows)
    big = (with_last(tokens, rows), mask_token, pos, big_shuffle)
    check(token_restore, big, (tokens, mask_token, pos, ids_shuffle))
    grad, of_mask = torch.randn(1, 1 + L, E).to(HALF), torch.empty(rows, E)
    with interpret(last=L + 1):
        restore_kernel._mask_token_grad_kernel[(rows,)](with_last(grad, rows), of_mask, 5 * E, E, L, K, E, num_warps=4)
    assert torch.allclose(of_mask[-1], grad[0, 1 + K :].float().sum(0), atol=1e-5)


def test_mask_indices():
    rows, patches = LIMIT // 256 + 3, 256
    noise = torch.rand(1, patches).to(HALF)
    check(mask_indices, (with_last(noise, rows),), (noise,))


def test_rows_of_the_penalty():
    m, d = 33, LIMIT // 33 + 128 - LIMIT // 33 % 128
    rows, shift = torch.empty(m, d, dtype=HALF), torch.empty(d)
    rows[:, -128:] = torch.randn(m, 128)
    with interpret(last=1):
        gram._shift_kernel[(d // gram.SHIFT["BLOCK_D"],)](rows, shift, m, d, d, **gram.SHIFT)
    assert (shift[-128:] - rows[: gram.SHIFT["ROWS"], -128:].float().mean(0)).abs().max() < 1e-5
    tail = rows[:, -128:].float() - shift[-128:]
    partial, norms = torch.zeros(1, m, m), torch.zeros(1, m)
    with interpret():
        gram._gram_kernel[(1, 1, 1)](rows[:, d - 128 :], shift[d - 128 :], partial, norms, m, 128, d, 128, **gram.GRAM)
    assert (partial[0] - tail @ tail.T).abs().max() < 1e-3
    assert torch.equal(norms[0], partial[0].diagonal())
    weights, out = torch.randn(m, m), torch.empty(m, d)
    config = nhsic_kernel.MATMUL
    with interpret(last=2):
        nhsic_kernel._matmul_kernel[(d // config["BLOCK_N"], 1)](weights, rows, shift, out, m, d, d, **config)
    assert (out[:, -128:] - weights @ tail).abs().max() < 1e-3
