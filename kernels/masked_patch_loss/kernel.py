"""masked_patch_loss in Triton: per-patch errors, their mean, and both gradients.

The target is never stored: each program reads its patches from the image and normalises them in registers.
"""

import torch
import triton
import triton.language as tl
from mimir_fast.kernels.launch import STORAGE, Launch, empty
from mimir_fast.kernels.masked_patch_loss.reference import VARIANCE_FLOOR
from mimir_fast.kernels.patch_tile import (
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
from mimir_fast.kernels.registration import register
from torch import Tensor

FLOOR = tl.constexpr(VARIANCE_FLOOR)
MEAN_BLOCK = 8192


@triton.jit
def _patch_error_kernel(
    pred, images, mask, errors, stride_b, stride_l, L, grid_w, C: tl.constexpr, PATCH: tl.constexpr, NORM: tl.constexpr
):
    """formula      errors[b,l] = mask * mean_P (pred - t)^2, t = the image's patch, normalised if NORM
    shapes       pred [B,L,P] with strides, images [B,C,H,W] and mask [B,L] contiguous -> errors [B,L]
    dtypes       any storage, fp32 accumulation and output
    bytes        pred and images where mask != 0, mask once, errors once
    determinism  one program per tile, fixed order
    source       He et al., Masked Autoencoders Are Scalable Vision Learners, 2022, section 3
    """
    P: tl.constexpr = C * PATCH * PATCH
    image, patch_R1 = tile_rows_of(L, tile_rows(P))
    number_1N = tl.arange(0, tile_block(P))[None, :]
    inside_1N = number_1N < P
    weight_R1 = tl.load(mask + image * L + patch_R1, mask=patch_R1 < L, other=0).to(tl.float32)
    read_RN = (weight_R1 != 0) & inside_1N
    offsets_RN = image_offsets(image, patch_R1, number_1N, L, grid_w, C, PATCH)
    target_RN = tl.load(images + offsets_RN, mask=read_RN, other=0).to(tl.float32)
    if NORM:
        target_RN, _ = normalise(target_RN, inside_1N, P, FLOOR)
    pred_RN = pred + image * stride_b + patch_R1 * stride_l + to_prediction_order(number_1N, C, PATCH)
    pred_RN = tl.load(pred_RN, mask=read_RN, other=0).to(tl.float32)
    difference_RN = tl.where(inside_1N, pred_RN - target_RN, 0.0)
    error_R1 = tl.sum(difference_RN * difference_RN, axis=1, keep_dims=True) / P
    error_R1 = tl.where(weight_R1 != 0, weight_R1 * error_R1, 0.0)
    tl.store(errors + image * L + patch_R1, error_R1, mask=patch_R1 < L)


@triton.jit
def _mean_kernel(errors, mask, mean, removed, n, BLOCK: tl.constexpr):
    """formula      removed = sum(mask), mean = sum(errors) / removed
    shapes       errors [n], mask [n] -> mean [], removed []
    dtypes       mask in any storage, fp32 accumulation and output
    bytes        errors and mask once
    determinism  one program, fixed order
    source       second stage of _patch_error_kernel
    """
    error_N = tl.zeros([BLOCK], tl.float32)
    count_N = tl.zeros([BLOCK], tl.float32)
    for start in range(0, n, BLOCK):
        index_N = start + tl.arange(0, BLOCK)
        error_N += tl.load(errors + index_N, mask=index_N < n, other=0)
        count_N += tl.load(mask + index_N, mask=index_N < n, other=0).to(tl.float32)
    count = tl.sum(count_N, axis=0)
    tl.store(removed, count)
    tl.store(mean, tl.sum(error_N, axis=0) / count)


def masked_patch_loss_forward(
    pred_BLP: Tensor, images_BCHW: Tensor, mask_BL: Tensor, patch_size: int, norm_pix_loss: bool
) -> tuple[Tensor, Tensor]:
    """The loss and the number of removed patches, both fp32 scalars."""
    pred_BLP, images_BCHW, mask_BL = _layout(pred_BLP, images_BCHW, mask_BL)
    B, L, P = pred_BLP.shape
    errors_BL, mean, removed = (images_BCHW.new_empty(s, dtype=torch.float32) for s in ((B, L), (), ()))
    _patch_error_kernel[tile_grid(B, L, P)](
        pred_BLP, images_BCHW, mask_BL, errors_BL, *_geometry(pred_BLP, images_BCHW, patch_size),
        NORM=norm_pix_loss, num_warps=NUM_WARPS,
    )  # fmt: skip
    _mean_kernel[(1,)](errors_BL, mask_BL, mean, removed, B * L, BLOCK=MEAN_BLOCK, num_warps=16)
    return mean, removed


@triton.jit
def _grad_pred_kernel(
    grad, pred, images, mask, removed, grad_pred, stride_b, stride_l, L, grid_w,
    C: tl.constexpr, PATCH: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    """formula      grad_pred = grad * mask / removed * 2/P * (pred - t), exactly zero where mask = 0
    shapes       as _patch_error_kernel; grad, removed [] -> grad_pred [B,L,P] contiguous
    dtypes       any storage, fp32 arithmetic; grad_pred in pred's dtype
    bytes        pred and images where mask != 0, mask once, grad_pred once
    determinism  exact: every element has one writer
    source       derivative of _patch_error_kernel
    """
    P: tl.constexpr = C * PATCH * PATCH
    image, patch_R1 = tile_rows_of(L, tile_rows(P))
    number_1N = tl.arange(0, tile_block(P))[None, :]
    inside_1N = number_1N < P
    weight_R1 = tl.load(mask + image * L + patch_R1, mask=patch_R1 < L, other=0).to(tl.float32)
    read_RN = (weight_R1 != 0) & inside_1N
    offsets_RN = image_offsets(image, patch_R1, to_image_order(number_1N, C, PATCH), L, grid_w, C, PATCH)
    target_RN = tl.load(images + offsets_RN, mask=read_RN, other=0).to(tl.float32)
    if NORM:
        target_RN, _ = normalise(target_RN, inside_1N, P, FLOOR)
    pred_RN = tl.load(pred + image * stride_b + patch_R1 * stride_l + number_1N, mask=read_RN, other=0).to(tl.float32)
    scale_R1 = tl.load(grad).to(tl.float32) / tl.load(removed) * weight_R1 * (2.0 / P)
    grad_RN = tl.where(read_RN, scale_R1 * (pred_RN - target_RN), 0.0)
    where_RN = grad_pred + (image * L + patch_R1) * P + number_1N
    tl.store(where_RN, grad_RN.to(grad_pred.dtype.element_ty), mask=(patch_R1 < L) & inside_1N)


def masked_patch_loss_grad_pred(
    grad: Tensor,
    pred_BLP: Tensor,
    images_BCHW: Tensor,
    mask_BL: Tensor,
    removed: Tensor,
    patch_size: int,
    norm_pix_loss: bool,
) -> Tensor:
    """Gradient in pred [B,L,P]."""
    pred_BLP, images_BCHW, mask_BL = _layout(pred_BLP, images_BCHW, mask_BL)
    grad_BLP = pred_BLP.new_empty(pred_BLP.shape)
    _grad_pred_kernel[tile_grid(*pred_BLP.shape)](
        grad, pred_BLP, images_BCHW, mask_BL, removed, grad_BLP, *_geometry(pred_BLP, images_BCHW, patch_size),
        NORM=norm_pix_loss, num_warps=NUM_WARPS,
    )  # fmt: skip
    return grad_BLP


@triton.jit
def _grad_images_kernel(
    grad, pred, images, mask, removed, grad_images, stride_b, stride_l, L, grid_w,
    C: tl.constexpr, PATCH: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    """formula      with e = t - pred: grad_images = grad * mask / removed * 2/P * (e, or, if NORM, its gradient through t)
    shapes       as _grad_pred_kernel; -> grad_images [B,C,H,W] contiguous
    dtypes       any storage, fp32 arithmetic; grad_images in the images' dtype
    bytes        pred and images where mask != 0, mask once, grad_images once
    determinism  exact: every element has one writer
    source       docs/fidelity.md: the gradient of the attack, patch by patch
    """
    P: tl.constexpr = C * PATCH * PATCH
    image, patch_R1 = tile_rows_of(L, tile_rows(P))
    number_1N = tl.arange(0, tile_block(P))[None, :]
    inside_1N = number_1N < P
    weight_R1 = tl.load(mask + image * L + patch_R1, mask=patch_R1 < L, other=0).to(tl.float32)
    read_RN = (weight_R1 != 0) & inside_1N
    offsets_RN = image_offsets(image, patch_R1, number_1N, L, grid_w, C, PATCH)
    target_RN = tl.load(images + offsets_RN, mask=read_RN, other=0).to(tl.float32)
    pred_RN = pred + image * stride_b + patch_R1 * stride_l + to_prediction_order(number_1N, C, PATCH)
    pred_RN = tl.load(pred_RN, mask=read_RN, other=0).to(tl.float32)
    scale_R1 = tl.load(grad).to(tl.float32) / tl.load(removed) * weight_R1 * (2.0 / P)
    if NORM:
        target_RN, rstd_R1 = normalise(target_RN, inside_1N, P, FLOOR)
        grad_RN = target_gradient(target_RN - pred_RN, target_RN, inside_1N, P) * rstd_R1
    else:
        grad_RN = target_RN - pred_RN
    grad_RN = tl.where(read_RN, scale_R1 * grad_RN, 0.0)
    tl.store(grad_images + offsets_RN, grad_RN.to(grad_images.dtype.element_ty), mask=(patch_R1 < L) & inside_1N)


def masked_patch_loss_grad_images(
    grad: Tensor,
    pred_BLP: Tensor,
    images_BCHW: Tensor,
    mask_BL: Tensor,
    removed: Tensor,
    patch_size: int,
    norm_pix_loss: bool,
) -> Tensor:
    """Gradient in the images [B,C,H,W], through the target."""
    pred_BLP, images_BCHW, mask_BL = _layout(pred_BLP, images_BCHW, mask_BL)
    grad_BCHW = images_BCHW.new_empty(images_BCHW.shape)
    _grad_images_kernel[tile_grid(*pred_BLP.shape)](
        grad, pred_BLP, images_BCHW, mask_BL, removed, grad_BCHW, *_geometry(pred_BLP, images_BCHW, patch_size),
        NORM=norm_pix_loss, num_warps=NUM_WARPS,
    )  # fmt: skip
    return grad_BCHW


def _layout(pred_BLP: Tensor, images_BCHW: Tensor, mask_BL: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What the kernels need: pred contiguous within a patch (the model's slice without class token is), the rest wholly."""
    return (
        pred_BLP if pred_BLP.stride(2) == 1 else pred_BLP.contiguous(),
        images_BCHW.contiguous(),
        mask_BL.contiguous(),
    )


def _geometry(pred_BLP: Tensor, images_BCHW: Tensor, patch_size: int) -> tuple[int, ...]:
    """stride_b, stride_l, L, grid_w, C, PATCH."""
    C, width = images_BCHW.shape[1], images_BCHW.shape[3]
    return *pred_BLP.stride()[:2], pred_BLP.shape[1], width // patch_size, C, patch_size


def _fake_forward(pred_BLP, images_BCHW, mask_BL, patch_size, norm_pix_loss):
    return images_BCHW.new_empty((), dtype=torch.float32), images_BCHW.new_empty((), dtype=torch.float32)


def _fake_grad_pred(grad, pred_BLP, images_BCHW, mask_BL, removed, patch_size, norm_pix_loss):
    return pred_BLP.new_empty(pred_BLP.shape)


def _fake_grad_images(grad, pred_BLP, images_BCHW, mask_BL, removed, patch_size, norm_pix_loss):
    return images_BCHW.new_empty(images_BCHW.shape)


_FORWARD = "(Tensor pred, Tensor images, Tensor mask, int patch_size, bool norm_pix_loss) -> (Tensor, Tensor)"
_BACKWARD = (
    "(Tensor grad, Tensor pred, Tensor images, Tensor mask, Tensor removed, int patch_size, bool norm) -> Tensor"
)
masked_patch_loss = register("masked_patch_loss", _FORWARD, masked_patch_loss_forward, _fake_forward)
grad_pred = register("masked_patch_loss_grad_pred", _BACKWARD, masked_patch_loss_grad_pred, _fake_grad_pred)
grad_images = register("masked_patch_loss_grad_images", _BACKWARD, masked_patch_loss_grad_images, _fake_grad_images)


def _save(ctx, inputs, output):
    pred_BLP, images_BCHW, mask_BL, ctx.patch_size, ctx.norm_pix_loss = inputs
    ctx.save_for_backward(pred_BLP, images_BCHW, mask_BL, output[1])


def _backward(ctx, grad, _grad_removed):
    arguments = (grad, *ctx.saved_tensors, ctx.patch_size, ctx.norm_pix_loss)
    of_pred = grad_pred(*arguments) if ctx.needs_input_grad[0] else None
    of_images = grad_images(*arguments) if ctx.needs_input_grad[1] else None
    return of_pred, of_images, None, None, None


masked_patch_loss.register_autograd(_backward, setup_context=_save)


def launches() -> list[Launch]:
    every = frozenset(["_patch_error_kernel", "_mean_kernel", "_grad_pred_kernel", "_grad_images_kernel"])
    one_number = frozenset(["_patch_error_kernel", "_mean_kernel"])  # they write one number per patch, and two in all
    configs = [(16, True), (16, False), (14, True), (8, True), (4, True), (2, True)]

    def call(p: int, norm: bool, dtype: torch.dtype):
        pred, images, mask = empty(8, 16, 3 * p * p, dtype=dtype), empty(8, 3, 4 * p, 4 * p), empty(8, 16)
        loss, removed = masked_patch_loss_forward(pred, images, mask, p, norm)
        masked_patch_loss_grad_pred(loss, pred, images, mask, removed, p, norm)
        masked_patch_loss_grad_images(loss, pred, images, mask, removed, p, norm)

    return [
        Launch(
            f"p{p} {'norm' if norm else 'pix'}",
            dtype,
            lambda p=p, norm=norm, d=d: call(p, norm, d),
            every if p in (2, 14) else one_number,
        )
        for p, norm in configs
        for dtype, d in STORAGE.items()
    ]
