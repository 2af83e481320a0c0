"""The cost of every operator against bytes and FLOPs counted by hand."""

import importlib
import re
from pathlib import Path

import pytest
import torch
from torch._subclasses import FakeTensorMode

from mimir_fast.kernels._shared.cost import Cost, cost, size

KERNELS = Path(__file__).parents[2] / "kernels"
BF16, I64 = torch.bfloat16, torch.int64
# No GPU step calls them.
ON_CPUS_ONLY = {"narrow_attention", "narrow_attention_grad"}
# B=2 images of 3x8x8 in patches of 4: L=4 patches of P=48 numbers, K=1 kept; storage fp32, indices 8 bytes.
B, L, K, M, P, E, m, d, n = 2, 4, 1, 3, 48, 6, 8, 10, 130
IMAGE, PATCHES = 4 * B * 3 * 64, 4 * B * M * P
CASES = {
    "mask_indices": 4 * B * L + 2 * 8 * B * L,
    "patch_gather": B * K * (P * (4 + 2) + 8),
    "patch_gather_grad": B * K * (4 * P + 8) + IMAGE,
    "linf_start": 2 * IMAGE + 4 * 12 + 8,
    "linf_patch_step": 3 * IMAGE + 4 * B * K * P + 4 * B * M * P + 8 * B * L + 4 * 12,
    "masked_patch_loss": 2 * PATCHES + 8 * B * M + 2 * 4 * B * M,
    "masked_patch_loss_grad_pred": 3 * PATCHES + 8 * B * M,
    "masked_patch_loss_grad_images": 3 * PATCHES + 8 * B * M + IMAGE,
    "token_restore": 4 * (B * (1 + K) * E + E + (1 + L) * E) + 8 * B * L + 4 * B * (1 + L) * E,
    "token_restore_grad": 4 * B * (1 + L) * E + 4 * E,
    "short_attention": 4 * B * E * (3 * L + L - 1),
    # and the bias's gradient, in fp32 from qkv's
    "short_attention_grad": 4 * B * E * (6 * L + 2 * (L - 1)) + 4 * B * 2 * (L - 1) + 3 * E * (2 + 4 * B * L),
    "add_layer_norm": n * E * (4 + 2) + E * (2 + 4 + 4) + n * (E * (4 + 2) + 2 * 4),
    # two groups of rows, for a tile has 128
    "add_layer_norm_grad": n * (E * (4 + 2 + 4) + 8) + 4 * E + n * E * (4 + 2) + 10 * E + 2 * 3 * 4 * E * 2,
    "linear_gelu": 2 * (n * E + 7 * E + 7 + 2 * n * 7),
    # two tiles of rows
    "gelu_linear_grad": 2 * (n * E + 7 * E + 2 * n * 7 + 7) + 2 * 4 * 2 * 7,
    "nhsic": 4 * (m + 2) * (d + 2 * d) + 2 * 5 * 2 * 4 * m * m,
    "nhsic_side": 4 * (m + 2) * d + 5 * 2 * 4 * m * m,
    "nhsic_given": 4 * (m + 2) * d + 5 * 2 * 4 * m * m,
    # the buffer once, of each image offset, size, box and flip
    **dict.fromkeys(("crop_resize", "crop_resize_yuv420"), 500 + B * (8 + 2 * 8 + 4 * 4 + 1) + 4 * B * 3 * 5 * 5),
    "nhsic_grad": 4 * (2 * m + 1) * d + 3 * 4 * m * m + 5 * 2 * 4 * m * m,
    # of a Swin's table of relative positions
    "sum_by_entry": n * (4 * E + 8) + 5 * 4 * E,
}


def arguments() -> dict[str, tuple]:
    """An operator's own, without data."""
    t = torch.zeros
    images, pred, removed, restore = t(B, 3, 8, 8), t(B, M, P), t(B, M, dtype=I64), t(B, L, dtype=I64)
    keep, visible, bounds, square, seed = t(B, K, dtype=I64), t(B, K, P), t(4, 3), t(m, m), t((), dtype=I64)
    rows, branch, row, row16 = t(n, E), t(n, E).to(BF16), t(E), t(E).to(BF16)
    weight16, hidden16, loss = t(7, E).to(BF16), t(7).to(BF16), (pred, images, removed, 4, True)
    windows = t(500, dtype=torch.uint8), t(B, dtype=I64), t(B, 2, dtype=I64), t(B, 4), t(B, dtype=torch.bool)
    return {
        **dict.fromkeys(("crop_resize", "crop_resize_yuv420"), (*windows, t(B, 3, 5, 5))),
        "mask_indices": (t(B, L),),
        "patch_gather": (images, keep, 4, 0.5, BF16),
        "patch_gather_grad": (visible, keep, [B, 3, 8, 8], 4, torch.float32),
        "linf_start": (images, bounds, seed),
        "linf_patch_step": (images, images, visible, pred, restore, bounds, 4, True),
        "masked_patch_loss": loss,
        "masked_patch_loss_grad_pred": (t(()), *loss),
        "masked_patch_loss_grad_images": (t(()), *loss),
        "token_restore": (t(B, 1 + K, E), t(E), t(1 + L, E), restore),
        "token_restore_grad": (t(B, 1 + L, E), K, torch.float32),
        "short_attention": (t(B, L, 3 * E), t(3 * E), 2, 1),
        "short_attention_grad": (t(B, L - 1, E), t(B, L, 3 * E), t(B, L - 1, E), t(B, 2, L - 1), 2, 1, BF16),
        "add_layer_norm": (rows, branch, row16, row, row, 1e-6, BF16, None),
        "add_layer_norm_grad": (rows, branch, rows, t(2, n), row, BF16, True, BF16, None),
        "linear_gelu": (branch, weight16, hidden16),
        "gelu_linear_grad": (branch, weight16.T, t(n, 7).to(BF16), True),
        "nhsic": (t(m, d), t(m, 2 * d), 5.0),
        "nhsic_side": (t(m, d), 5.0),
        "nhsic_given": (t(m, d), square, 5.0),
        "nhsic_grad": (t(()), t(m, d), t(d), square, square, square, 5.0),
        "sum_by_entry": (rows, t(n, dtype=I64), 5),
    }


@pytest.fixture(scope="module", autouse=True)
def operators():
    """Every operator of ours is registered."""
    for path in KERNELS.glob("*/kernel.py"):
        importlib.import_module(f"mimir_fast.kernels.{path.parent.name}.kernel")
    importlib.import_module("mimir_fast.models.families.swin.layers")


def costed(name: str, *given) -> Cost:
    result = getattr(torch.ops.mimir_fast, name)(*given)
    if result is None:
        # Written into the last argument.
        result = given[-1]
    return cost(name, given, list(result) if isinstance(result, (list, tuple)) else [result])


def test_every_operator_has_a_case():
    # Without the overload's name: an operation with a gradient is defined around its kernel.
    names = re.findall(r"^mimir_fast::(\w+)", "\n".join(torch._C._dispatch_get_all_op_names()), re.MULTILINE)
    assert set(names) - ON_CPUS_ONLY == CASES.keys()
    folders = {path.parent.name for path in KERNELS.glob("[!_]*/cost.py")}
    for folder in folders:
        module = importlib.import_module(f"mimir_fast.kernels.{folder}.cost")
        own = {name for name, value in vars(module).items() if getattr(value, "__module__", "") == module.__name__}
        assert {name for name in own if not name.startswith("_")} <= CASES.keys(), "no operator of this name"


def test_costs_counted_by_hand():
    with FakeTensorMode():
        found = {name: costed(name, *given) for name, given in arguments().items()}
    assert {name: c.bytes for name, c in found.items()} == CASES
    assert {name: c.flops for name, c in found.items() if c.flops} == {
        "nhsic": {"tf32": 3 * m * m * 3 * d},
        "nhsic_side": {"tf32": 3 * m * m * d},
        "nhsic_given": {"tf32": 3 * m * m * d},
        "nhsic_grad": {"tf32": 3 * (2 * 2 * m**3 + 2 * m * m * d)},
        "short_attention": {"tf32": 4 * B * L * (L - 1) * E},
        "short_attention_grad": {"tf32": 10 * B * L * (L - 1) * E},
        "linear_gelu": {"bf16": 2 * n * E * 7},
        "gelu_linear_grad": {"bf16": 2 * n * E * 7},
    }
    attention, products = ("short_attention", "short_attention_grad"), ("linear_gelu", "gelu_linear_grad")
    kinds = {name: c.kind for name, c in found.items() if c.kind != "ours"}
    assert kinds == dict.fromkeys(attention, "attention") | dict.fromkeys(products, "GEMM")
    solves = {name: c.solves for name, c in found.items() if c.solves}
    side = [("linalg_cholesky_ex", m), ("cholesky_inverse", m)]
    assert solves == {"nhsic": 2 * side, "nhsic_side": side, "nhsic_given": side}


@pytest.mark.parametrize("factors", [False, True])
def test_a_layer_norm_that_learns_nothing(factors):
    """It adds nothing, or a branch of each image by a factor of the image."""
    rows, D, images = 20, 64, 4
    with FakeTensorMode():
        x, row = torch.zeros(images, rows // images, D), torch.zeros(D)
        keep, delta, dtype = (torch.zeros(images), x, torch.float32) if factors else (None, None, None)
        s, out, statistics = torch.ops.mimir_fast.add_layer_norm(x, delta, None, row, row, 1e-6, BF16, keep)
        forward = costed("add_layer_norm", x, delta, None, row, row, 1e-6, BF16, keep)
        ds, total = (s, s) if factors else (None, x)
        backward = costed("add_layer_norm_grad", ds, out, total, statistics, row, dtype, False, None, keep)
    assert forward.bytes == rows * (D * (4 + 2 + factors * (4 + 4)) + 8) + 2 * 4 * D + factors * 4 * images
    # the gradient of delta is one of its own
    assert backward.bytes == rows * (D * (2 + 4 + 4 + factors * (4 + 4)) + 8) + 4 * D + factors * 4 * images


def test_size_counts_expanded_elements_once():
    assert size(torch.zeros(7).expand(3, 7), None, torch.zeros(2, dtype=BF16)) == 4 * 7 + 4
