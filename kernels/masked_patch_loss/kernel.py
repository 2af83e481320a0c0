"""masked_patch_loss in Triton: per-patch errors, their mean, and both gradients.

The target is never stored: each program reads its patches from the image and normalises them in registers.
"""

import math
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from mimir_fast.kernels._shared.launch import FUSED, STORAGE, Launch, Prepared, Result, empty, memoised
from mimir_fast.kernels._shared.patch_tile import (
    NUM_WARPS,
    image_offsets,
    normalise,
    target_gradient,
    tile_block,
    tile_grid,
    tile_rows,
    tile_rows_of,
    to_image_order,
    to_prediction_order,
)
from mimir_fast.kernels._shared.pixels import pixels
from mimir_fast.kernels._shared.registration import register
from mimir_fast.kernels.masked_patch_loss.reference import VARIANCE_FLOOR

FLOOR = tl.constexpr(VARIANCE_FLOOR)
# Errors that the one program of _mean_kernel adds at a time: 16 for each thread of its 16 warps.
MEAN_BLOCK = 8192


@triton.jit
def _removed(ids, image, row_R1, M):
    """Patch id of each row of pred."""
    return tl.load(ids + image * M + row_R1, mask=row_R1 < M, other=0).to(tl.int32)


@triton.jit
def _patch_error_kernel(
    pred, images, ids, errors, stride_b, stride_m, M, L, grid_w, C: tl.constexpr, PATCH: tl.constexpr,
    NORM: tl.constexpr,
):  # fmt: skip
    """formula      errors[b,m] = mean_P (pred - t)^2, t = patch ids[b,m] of the image, normalised if NORM
    shapes       pred [B,M,P] with strides, images [B,C,H,W] and ids [B,M] contiguous -> errors [B,M]
    dtypes       any storage, fp32 accumulation and output
    bytes        pred, its patches of the images and ids once, errors once
    determinism  one program per tile, fixed order
    source       He et al., Masked Autoencoders Are Scalable Vision Learners, 2022, section 3
    """
    P: tl.constexpr = C * PATCH * PATCH
    image, row_R1 = tile_rows_of(M, tile_rows(P))
    number_1N = tl.arange(0, tile_block(P))[None, :]
    inside_1N = number_1N < P
    read_RN = (row_R1 < M) & inside_1N
    offsets_RN = image_offsets(image, _removed(ids, image, row_R1, M), number_1N, L, grid_w, C, PATCH)
    target_RN = pixels(images, offsets_RN, read_RN)
    if NORM:
        target_RN, _ = normalise(target_RN, inside_1N, P, FLOOR)
    pred_RN = pred + image * stride_b + row_R1.to(tl.int64) * stride_m + to_prediction_order(number_1N, C, PATCH)
    pred_RN = tl.load(pred_RN, mask=read_RN, other=0).to(tl.float32)
    difference_RN = tl.where(inside_1N, pred_RN - target_RN, 0.0)
    error_R1 = tl.sum(difference_RN * difference_RN, axis=1, keep_dims=True) / P
    tl.store(errors + image * M + row_R1, error_R1, mask=row_R1 < M)


@triton.jit
def _mean_kernel(errors, mean, n, BLOCK: tl.constexpr):
    """formula      mean = sum(errors) / n
    shapes       errors [n] -> mean []
    dtypes       fp32
    bytes        errors once
    determinism  one program, fixed order
    source       second stage of _patch_error_kernel
    """
    error_N = tl.zeros([BLOCK], tl.float32)
    for start in range(0, n, BLOCK):
        index_N = start + tl.arange(0, BLOCK)
        error_N += tl.load(errors + index_N, mask=index_N < n, other=0)
    tl.store(mean, tl.sum(error_N, axis=0) / n)


def masked_patch_loss_forward(
    pred_BMP: Tensor, images_BCHW: Tensor, ids_BM: Tensor, patch_size: int, norm_pix_loss: bool
) -> Tensor:
    """The loss, an fp32 scalar."""
    pred_BMP, images_BCHW, ids_BM = _layout(pred_BMP, images_BCHW, ids_BM)
    launch = _prepared(
        "error", pred_BMP.shape, pred_BMP.stride(), pred_BMP.dtype, images_BCHW.shape, patch_size, norm_pix_loss
    )
    (errors_BM,) = launch(pred_BMP, images_BCHW, ids_BM)
    (mean,) = _prepared_mean(errors_BM.shape)(errors_BM)
    return mean


@triton.jit
def _grad_pred_kernel(
    grad, pred, images, ids, grad_pred, scale, stride_b, stride_m, M, L, grid_w,
    C: tl.constexpr, PATCH: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    """formula      grad_pred = grad * scale * (pred - t), scale = 2 / (B M P)
    shapes       as _patch_error_kernel; grad [] -> grad_pred [B,M,P] contiguous
    dtypes       any storage, fp32 arithmetic; grad_pred in pred's dtype
    bytes        pred, its patches of the images and ids once, grad_pred once
    determinism  exact: every element has one writer
    source       derivative of _patch_error_kernel
    """
    P: tl.constexpr = C * PATCH * PATCH
    image, row_R1 = tile_rows_of(M, tile_rows(P))
    number_1N = tl.arange(0, tile_block(P))[None, :]
    inside_1N = number_1N < P
    read_RN = (row_R1 < M) & inside_1N
    # This kernel writes grad_pred, so it works in the prediction's order; the others read the image at full width.
    in_image_1N = to_image_order(number_1N, C, PATCH)
    offsets_RN = image_offsets(image, _removed(ids, image, row_R1, M), in_image_1N, L, grid_w, C, PATCH)
    target_RN = pixels(images, offsets_RN, read_RN)
    if NORM:
        target_RN, _ = normalise(target_RN, inside_1N, P, FLOOR)
    pred_RN = tl.load(pred + image * stride_b + row_R1.to(tl.int64) * stride_m + number_1N, mask=read_RN, other=0).to(
        tl.float32
    )
    grad_RN = tl.load(grad).to(tl.float32) * scale * (pred_RN - target_RN)
    where_RN = grad_pred + (image * M + row_R1) * P + number_1N
    tl.store(where_RN, grad_RN.to(grad_pred.dtype.element_ty), mask=read_RN)


def masked_patch_loss_grad_pred(
    grad: Tensor, pred_BMP: Tensor, images_BCHW: Tensor, ids_BM: Tensor, patch_size: int, norm_pix_loss: bool
) -> Tensor:
    """Gradient in pred [B,M,P]."""
    pred_BMP, images_BCHW, ids_BM = _layout(pred_BMP, images_BCHW, ids_BM)
    launch = _prepared(
        "grad_pred", pred_BMP.shape, pred_BMP.stride(), pred_BMP.dtype, images_BCHW.shape, patch_size, norm_pix_loss
    )
    (grad_BMP,) = launch(grad, pred_BMP, images_BCHW, ids_BM)
    return grad_BMP


@triton.jit
def _grad_images_kernel(
    grad, pred, images, ids, grad_images, scale, stride_b, stride_m, M, L, grid_w,
    C: tl.constexpr, PATCH: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    """formula      with e = t - pred: grad_images = grad * scale * (e, or, if NORM, its gradient through t) in removed patches
    shapes       as _grad_pred_kernel; grad_images [B,C,H,W] contiguous, zero before
    dtypes       any storage, fp32 arithmetic; grad_images in the images' dtype
    bytes        pred, its patches of the images and ids once, the same patches of grad_images once
    determinism  exact: every element has one writer
    source       docs/fidelity.md: the gradient of the attack, patch by patch
    """
    P: tl.constexpr = C * PATCH * PATCH
    image, row_R1 = tile_rows_of(M, tile_rows(P))
    number_1N = tl.arange(0, tile_block(P))[None, :]
    inside_1N = number_1N < P
    read_RN = (row_R1 < M) & inside_1N
    offsets_RN = image_offsets(image, _removed(ids, image, row_R1, M), number_1N, L, grid_w, C, PATCH)
    target_RN = pixels(images, offsets_RN, read_RN)
    pred_RN = pred + image * stride_b + row_R1.to(tl.int64) * stride_m + to_prediction_order(number_1N, C, PATCH)
    pred_RN = tl.load(pred_RN, mask=read_RN, other=0).to(tl.float32)
    if NORM:
        target_RN, rstd_R1 = normalise(target_RN, inside_1N, P, FLOOR)
        grad_RN = target_gradient(target_RN - pred_RN, target_RN, inside_1N, P) * rstd_R1
    else:
        grad_RN = target_RN - pred_RN
    grad_RN = tl.load(grad).to(tl.float32) * scale * grad_RN
    tl.store(grad_images + offsets_RN, grad_RN.to(grad_images.dtype.element_ty), mask=read_RN)


def masked_patch_loss_grad_images(
    grad: Tensor, pred_BMP: Tensor, images_BCHW: Tensor, ids_BM: Tensor, patch_size: int, norm_pix_loss: bool
) -> Tensor:
    """Gradient in the images [B,C,H,W], through the target."""
    pred_BMP, images_BCHW, ids_BM = _layout(pred_BMP, images_BCHW, ids_BM)
    # Zeros: the kernel writes removed patches only, and the target does not depend on the others.
    grad_BCHW = images_BCHW.new_zeros(images_BCHW.shape)
    launch = _prepared(
        "grad_images", pred_BMP.shape, pred_BMP.stride(), pred_BMP.dtype, images_BCHW.shape, patch_size, norm_pix_loss
    )
    launch(grad, pred_BMP, images_BCHW, ids_BM, grad_BCHW)
    return grad_BCHW


@memoised
def _prepared(
    of: str,
    shape: torch.Size,
    strides: tuple[int, ...],
    dtype: torch.dtype,
    images: torch.Size,
    patch_size: int,
    norm: bool,
) -> Prepared:
    """of: "error", "grad_pred" or "grad_images"; shape, strides and dtype of pred, shape of the images."""
    (B, M, P), (_, C, height, width), p = shape, images, patch_size
    kernels = {"error": _patch_error_kernel, "grad_pred": _grad_pred_kernel, "grad_images": _grad_images_kernel}
    # The images' gradient is not a result: it is zero before.
    results: dict[str, list[Result]] = {
        "error": [((B, M), torch.float32)],
        "grad_pred": [(shape, dtype)],
        "grad_images": [],
    }
    scale = () if of == "error" else (2 / (B * M * P),)
    numbers = (*scale, *strides[:2], M, height // p * (width // p), width // p)
    options = {"C": C, "PATCH": p, "NORM": norm, "num_warps": NUM_WARPS, **FUSED}
    return Prepared(kernels[of], tile_grid(B, M, P), *numbers, results=results[of], **options)


@memoised
def _prepared_mean(shape: torch.Size) -> Prepared:
    options = {"BLOCK": MEAN_BLOCK, "num_warps": 16, **FUSED}
    # One program adds them all: atomics would add in another order every time.
    return Prepared(_mean_kernel, (1,), math.prod(shape), results=[((), torch.float32)], **options)


def _layout(pred_BMP: Tensor, images_BCHW: Tensor, ids_BM: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The arguments as the kernels read them: pred contiguous within a patch, images and ids contiguous."""
    # pred is usually a slice of the decoder's output, without the class token: copying it would cost more than the loss.
    pred_BMP = pred_BMP if pred_BMP.stride(2) == 1 else pred_BMP.contiguous()
    return pred_BMP, images_BCHW.contiguous(), ids_BM.contiguous()


def _save(ctx, inputs, output):
    *tensors, ctx.patch_size, ctx.norm_pix_loss = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx, grad):
    arguments = (grad, *ctx.saved_tensors, ctx.patch_size, ctx.norm_pix_loss)
    of_pred = grad_pred(*arguments) if ctx.needs_input_grad[0] else None
    of_images = grad_images(*arguments) if ctx.needs_input_grad[1] else None
    return of_pred, of_images, None, None, None


_ARGUMENTS = "Tensor pred, Tensor images, Tensor ids, int patch_size, bool norm_pix_loss) -> Tensor"
masked_patch_loss = register(
    "masked_patch_loss",
    f"({_ARGUMENTS}",
    masked_patch_loss_forward,
    lambda pred, images, *_: images.new_empty((), dtype=torch.float32),
    gradient=(_save, _backward),
)
grad_pred = register(
    "masked_patch_loss_grad_pred",
    f"(Tensor grad, {_ARGUMENTS}",
    masked_patch_loss_grad_pred,
    lambda grad, pred, *_: pred.new_empty(pred.shape),
)
grad_images = register(
    "masked_patch_loss_grad_images",
    f"(Tensor grad, {_ARGUMENTS}",
    masked_patch_loss_grad_images,
    lambda grad, pred, images, *_: images.new_empty(images.shape),
)


def launches() -> list[Launch]:
    every = frozenset(["_patch_error_kernel", "_mean_kernel", "_grad_pred_kernel", "_grad_images_kernel"])
    # They write one number per patch, and one in all.
    one_number = frozenset(["_patch_error_kernel", "_mean_kernel"])
    configs = [(16, True), (16, False), (14, True), (8, True), (4, True), (2, True)]

    def call(p: int, norm: bool, dtype: torch.dtype, storage: torch.dtype = torch.float32):
        pred, images = empty(8, 12, 3 * p * p, dtype=dtype), empty(8, 3, 4 * p, 4 * p, dtype=storage)
        arguments = (pred, images, empty(8, 12, dtype=torch.int64), p, norm)
        loss = masked_patch_loss_forward(*arguments)
        masked_patch_loss_grad_pred(loss, *arguments)
        # uint8 images have no gradient.
        if storage.is_floating_point:
            masked_patch_loss_grad_images(loss, *arguments)

    images = {"bf16 images": torch.bfloat16, "fp16 images": torch.float16, "uint8 images": torch.uint8}
    mixed = [
        Launch(f"p16 norm, {name}", "bf16", partial(call, 16, True, torch.bfloat16, d), one_number)
        for name, d in images.items()
    ]
    return mixed + [
        Launch(
            f"p{p} {'norm' if norm else 'pix'}",
            dtype,
            partial(call, p, norm, d),
            # Rows of a patch of side 2 or 14 are shorter than 16 bytes, or no multiple of them.
            every if p in (2, 14) else one_number,
        )
        for p, norm in configs
        for dtype, d in STORAGE.items()
    ]
