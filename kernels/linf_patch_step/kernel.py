"""linf_patch_step in Triton: one pass over the images; the image's gradient is never stored."""

from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from mimir_fast.kernels._shared.launch import FUSED, STORAGE, Launch, Prepared, empty, memoised
from mimir_fast.kernels._shared.patch_tile import (
    NUM_WARPS,
    image_offsets,
    normalise,
    target_gradient,
    tile_block,
    tile_grid,
    tile_rows,
    tile_rows_of,
    to_prediction_order,
)
from mimir_fast.kernels._shared.pixels import pixels
from mimir_fast.kernels._shared.registration import register
from mimir_fast.kernels.linf_patch_step import reference
from mimir_fast.kernels.masked_patch_loss.reference import VARIANCE_FLOOR

FLOOR = tl.constexpr(VARIANCE_FLOOR)
# A NaN pixel stays NaN: without this tl.clamp would turn it into a bound, and a diverged attack would go unseen.
NAN = tl.constexpr(tl.PropagateNan.ALL)


@triton.jit
def _per_channel(values, number_1N, C: tl.constexpr, PATCH: tl.constexpr):
    """The value of each number's channel."""
    # C scalar loads and selects; a load per number would be many narrow accesses.
    value_1N = tl.zeros(number_1N.shape, tl.float32)
    for channel in tl.static_range(C):
        value_1N = tl.where(number_1N // (PATCH * PATCH) == channel, tl.load(values + channel), value_1N)
    return value_1N


@triton.jit
def _linf_patch_step_kernel(
    images, adv, grad_visible, pred, ids_restore, bounds, stepped, stride_b, stride_l, L, K, grid_w,
    C: tl.constexpr, PATCH: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    """formula      stepped = clip(x + clip(adv + alpha * sign(g) - x, +-eps), lo, hi); r = ids_restore[b,l];
                 g = grad_visible[b,r] if r < K, else the positive multiple of d loss / d adv that target_gradient gives
    shapes       images, adv, stepped [B,C,H,W], grad_visible [B,K,P] contiguous, pred [B,L-K,P] with strides, bounds [4,C]
    dtypes       any storage, uint8 images divided by 255, fp32 arithmetic; stepped in the images' dtype, adv's for uint8
    bytes        images, adv and stepped once, grad_visible once, pred of removed patches once, ids_restore once
    determinism  exact: every pixel has one writer
    source       MIMIR, arXiv 2312.04960, section 4; docs/fidelity.md for the gradient patch by patch
    """
    P: tl.constexpr = C * PATCH * PATCH
    image, patch_R1 = tile_rows_of(L, tile_rows(P))
    number_1N = tl.arange(0, tile_block(P))[None, :]
    inside_1N = number_1N < P
    exists_RN = (patch_R1 < L) & inside_1N
    # A patch's rank says where it is: rows 0..K-1 are those of grad_visible, the rest those of pred.
    rank_R1 = tl.load(ids_restore + image * L + patch_R1, mask=patch_R1 < L, other=0)
    visible_R1 = rank_R1 < K
    offsets_RN = image_offsets(image, patch_R1, number_1N, L, grid_w, C, PATCH)
    adv_RN = tl.load(adv + offsets_RN, mask=exists_RN, other=0).to(tl.float32)
    clean_RN = pixels(images, offsets_RN, exists_RN)
    seen_RN = grad_visible + (image * K + rank_R1) * P + number_1N
    seen_RN = tl.load(seen_RN, mask=exists_RN & visible_R1, other=0).to(tl.float32)
    pred_RN = pred + image * stride_b + (rank_R1 - K) * stride_l + to_prediction_order(number_1N, C, PATCH)
    pred_RN = tl.load(pred_RN, mask=exists_RN & (rank_R1 >= K), other=0).to(tl.float32)
    if NORM:
        target_RN, _ = normalise(adv_RN, inside_1N, P, FLOOR)
        hidden_RN = target_gradient(target_RN - pred_RN, target_RN, inside_1N, P)
    else:
        hidden_RN = adv_RN - pred_RN
    grad_RN = tl.where(visible_R1, seen_RN, hidden_RN)
    # A NaN compares false both ways: its sign is 0, as torch.sign's.
    sign_RN = (grad_RN > 0).to(tl.float32) - (grad_RN < 0).to(tl.float32)
    eps_1N = _per_channel(bounds, number_1N, C, PATCH)
    alpha_1N = _per_channel(bounds + C, number_1N, C, PATCH)
    lo_1N = _per_channel(bounds + 2 * C, number_1N, C, PATCH)
    hi_1N = _per_channel(bounds + 3 * C, number_1N, C, PATCH)
    delta_RN = tl.clamp(adv_RN + alpha_1N * sign_RN - clean_RN, -eps_1N, eps_1N, NAN)
    stepped_RN = tl.clamp(clean_RN + delta_RN, lo_1N, hi_1N, NAN)
    tl.store(stepped + offsets_RN, stepped_RN.to(stepped.dtype.element_ty), mask=exists_RN)


def linf_patch_step_forward(
    images_BCHW: Tensor,
    adv_BCHW: Tensor,
    grad_visible_BKP: Tensor,
    pred_BMP: Tensor,
    ids_restore_BL: Tensor,
    bounds_4C: Tensor,
    patch_size: int,
    norm_pix_loss: bool,
) -> Tensor:
    """The next adversarial images [B,C,H,W], contiguous."""
    images_BCHW, adv_BCHW = images_BCHW.contiguous(), adv_BCHW.contiguous()
    pred_BMP = pred_BMP if pred_BMP.stride(2) == 1 else pred_BMP.contiguous()
    shape, dtype = images_BCHW.shape, reference.stepped_dtype(images_BCHW, adv_BCHW)
    launch = _prepared(shape, dtype, grad_visible_BKP.shape[1], pred_BMP.stride(), patch_size, norm_pix_loss)
    grad_visible_BKP, ids_restore_BL = grad_visible_BKP.contiguous(), ids_restore_BL.contiguous()
    (stepped,) = launch(images_BCHW, adv_BCHW, grad_visible_BKP, pred_BMP, ids_restore_BL, bounds_4C.contiguous())
    return stepped


@memoised
def _prepared(
    shape: torch.Size, dtype: torch.dtype, K: int, strides: tuple[int, ...], patch_size: int, norm: bool
) -> Prepared:
    """shape of the images, dtype of the result, strides of pred."""
    (B, C, height, width), p = shape, patch_size
    L, grid_w = height // p * (width // p), width // p
    options = {"C": C, "PATCH": p, "NORM": norm, "num_warps": NUM_WARPS, **FUSED}
    grid, numbers = tile_grid(B, L, C * p * p), (*strides[:2], L, K, grid_w)
    return Prepared(_linf_patch_step_kernel, grid, *numbers, results=[(shape, dtype)], **options)


linf_patch_step = register(
    "linf_patch_step",
    "(Tensor images, Tensor adv, Tensor grad_visible, Tensor pred, Tensor ids_restore, Tensor bounds, int patch_size, "
    "bool norm_pix_loss) -> Tensor",
    linf_patch_step_forward,
    lambda images, adv, *_: images.new_empty(images.shape, dtype=reference.stepped_dtype(images, adv)),
)


def launches() -> list[Launch]:
    def call(p: int, norm: bool, dtype: torch.dtype, storage: torch.dtype = torch.float32):
        P, image = 3 * p * p, (8, 3, 4 * p, 4 * p)
        ids_restore, bounds = empty(8, 16, dtype=torch.int64), empty(4, 3)
        grad_visible, pred = empty(8, 4, P, dtype=dtype), empty(8, 12, P, dtype=dtype)
        images = empty(*image, dtype=storage)
        adv = empty(*image, dtype=storage if storage.is_floating_point else torch.float32)
        linf_patch_step_forward(images, adv, grad_visible, pred, ids_restore, bounds, p, norm)

    mixed = [
        Launch(f"p16 norm, {name} images", "bf16", partial(call, 16, True, torch.bfloat16, d))
        for name, d in [*STORAGE.items(), ("uint8", torch.uint8)]
        if name != "fp32"
    ]
    return mixed + [
        Launch(
            f"p{p} {'norm' if norm else 'pix'}",
            dtype,
            partial(call, p, norm, d),
            # Rows of a patch are shorter than 16 bytes, or no multiple of them.
            frozenset(["_linf_patch_step_kernel"] if p in (2, 14) else []),
        )
        for p, norm in [(16, True), (16, False), (14, True), (8, True), (4, True), (2, True)]
        for dtype, d in STORAGE.items()
    ]
