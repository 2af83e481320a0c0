"""patch_gather in Triton: kept patches are read from the image at any strides; backward, every pixel is written once."""

from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from mimir_fast.kernels._shared.launch import FUSED, STORAGE, Launch, Prepared, empty, memoised
from mimir_fast.kernels._shared.patch_tile import NUM_WARPS, tile_block, tile_grid, tile_rows, tile_rows_of
from mimir_fast.kernels._shared.pixels import pixels
from mimir_fast.kernels._shared.registration import register

# Kept indices that the backward kernel compares with at a time.
CHUNK = 32


@triton.jit
def _pixel_offsets(patch_R1, number_1N, grid_w, stride_c, stride_h, stride_w, PATCH: tl.constexpr):
    """Offsets [ROWS,BLOCK] into one image, of numbers in (channel, row, column) order."""
    # Written as (channel and row, column), the compiler sees runs of PATCH numbers and emits 16-byte accesses.
    line_1N = number_1N // PATCH
    row_RN = patch_R1 // grid_w * PATCH + line_1N % PATCH
    column_RN = patch_R1 % grid_w * PATCH + number_1N % PATCH
    return (
        (line_1N // PATCH).to(tl.int64) * stride_c + row_RN.to(tl.int64) * stride_h + column_RN.to(tl.int64) * stride_w
    )


@triton.jit
def _gather_kernel(
    images, ids_keep, patches, offset, K, stride_id, grid_w, stride_b, stride_c, stride_h, stride_w,
    C: tl.constexpr, PATCH: tl.constexpr,
):  # fmt: skip
    """formula      patches[b,k] = flatten(patch ids_keep[b,k] of images[b] - offset), uint8 divided by 255
    shapes       images [B,C,H,W] with strides, ids_keep [B,K] with row stride -> patches [B,K,P] contiguous
    dtypes       any storage, uint8 included, fp32 arithmetic; patches in any float dtype
    bytes        the kept patches read once and written once, the indices read once
    determinism  exact
    source       Dosovitskiy et al., An Image Is Worth 16x16 Words, 2021, equation 1, restricted to visible patches
    """
    P: tl.constexpr = C * PATCH * PATCH
    image, kept_R1 = tile_rows_of(K, tile_rows(P))
    number_1N = tl.arange(0, tile_block(P))[None, :]
    exists_RN = (kept_R1 < K) & (number_1N < P)
    patch_R1 = tl.load(ids_keep + image * stride_id + kept_R1, mask=kept_R1 < K, other=0).to(tl.int32)
    place_RN = _pixel_offsets(patch_R1, number_1N, grid_w, stride_c, stride_h, stride_w, PATCH)
    value_RN = pixels(images + image * stride_b, place_RN, exists_RN) - offset
    tl.store(patches + (image * K + kept_R1) * P + number_1N, value_RN.to(patches.dtype.element_ty), mask=exists_RN)


def patch_gather_forward(
    images_BCHW: Tensor, ids_keep_BK: Tensor, patch_size: int, offset: float, dtype: torch.dtype
) -> Tensor:
    """The kept patches [B,K,P]."""
    # ids_keep is a slice of ids_shuffle: neighbouring numbers, rows L apart.
    ids_keep_BK = ids_keep_BK if ids_keep_BK.stride(1) == 1 else ids_keep_BK.contiguous()
    images, ids = (images_BCHW.shape, images_BCHW.stride()), (ids_keep_BK.shape[1], ids_keep_BK.stride(0))
    (patches_BKP,) = _prepared_forward(*images, *ids, patch_size, offset, dtype)(images_BCHW, ids_keep_BK)
    return patches_BKP


@memoised
def _prepared_forward(
    shape: torch.Size,
    strides: tuple[int, ...],
    K: int,
    stride_id: int,
    patch_size: int,
    offset: float,
    dtype: torch.dtype,
) -> Prepared:
    """shape and strides of the images, dtype of the patches."""
    B, C, _, width = shape
    P, options = C * patch_size**2, {"C": C, "PATCH": patch_size, "num_warps": NUM_WARPS, **FUSED}
    numbers, results = (offset, K, stride_id, width // patch_size, *strides), [((B, K, P), dtype)]
    return Prepared(_gather_kernel, tile_grid(B, K, P), *numbers, results=results, **options)


@triton.jit
def _scatter_kernel(
    grad,
    ids_keep,
    grad_images,
    K,
    stride_id,
    L,
    grid_w,
    plane,
    C: tl.constexpr,
    PATCH: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """formula      grad_images at patch l of image b = grad[b,k] where ids_keep[b,k] = l, zero where no k keeps l
    shapes       grad [B,K,P], ids_keep [B,K], grad_images [B,C,H,W] contiguous; plane = H*W
    dtypes       any float storage; grad_images in any float dtype
    bytes        grad once, the indices once per tile (from L1), grad_images once
    determinism  exact: every pixel has one writer
    source       derivative of _gather_kernel
    """
    P: tl.constexpr = C * PATCH * PATCH
    image, patch_R1 = tile_rows_of(L, tile_rows(P))
    number_1N = tl.arange(0, tile_block(P))[None, :]
    # Each patch looks for its row of grad, instead of each row writing its patch: so removed patches are set to zero in the
    # same pass, and no pixel has two writers.
    kept_R1 = tl.full(patch_R1.shape, -1, tl.int32)
    for start in range(0, K, CHUNK):
        k_1C = start + tl.arange(0, CHUNK)[None, :]
        id_1C = tl.load(ids_keep + image * stride_id + k_1C, mask=k_1C < K, other=-1)
        found_RC = tl.where(id_1C == patch_R1, k_1C, -1)
        kept_R1 = tl.maximum(kept_R1, tl.max(found_RC, axis=1, keep_dims=True))
    exists_RN = (patch_R1 < L) & (number_1N < P)
    grad_RN = grad + (image * K + kept_R1) * P + number_1N
    grad_RN = tl.load(grad_RN, mask=exists_RN & (kept_R1 >= 0), other=0)
    width = grid_w * PATCH
    pixel_RN = grad_images + image * (C * plane) + _pixel_offsets(patch_R1, number_1N, grid_w, plane, width, 1, PATCH)
    tl.store(pixel_RN, grad_RN.to(grad_images.dtype.element_ty), mask=exists_RN)


def patch_gather_backward(
    grad_BKP: Tensor, ids_keep_BK: Tensor, shape: list[int], patch_size: int, dtype: torch.dtype
) -> Tensor:
    """The gradient in the images [B,C,H,W]: zero outside the kept patches."""
    ids_keep_BK = ids_keep_BK if ids_keep_BK.stride(1) == 1 else ids_keep_BK.contiguous()
    launch = _prepared_backward(tuple(shape), ids_keep_BK.shape[1], ids_keep_BK.stride(0), patch_size, dtype)
    (grad_BCHW,) = launch(grad_BKP.contiguous(), ids_keep_BK)
    return grad_BCHW


@memoised
def _prepared_backward(shape: tuple[int, ...], K: int, stride_id: int, patch_size: int, dtype: torch.dtype) -> Prepared:
    """shape and dtype of the images."""
    (B, C, H, W), p = shape, patch_size
    L, options = H * W // p**2, {"C": C, "PATCH": p, "CHUNK": CHUNK, "num_warps": NUM_WARPS, **FUSED}
    grid, numbers = tile_grid(B, L, C * p * p), (K, stride_id, L, W // p, H * W)
    return Prepared(_scatter_kernel, grid, *numbers, results=[(shape, dtype)], **options)


def _fake_forward(images_BCHW, ids_keep_BK, patch_size, offset, dtype):
    return images_BCHW.new_empty((*ids_keep_BK.shape, images_BCHW.shape[1] * patch_size**2), dtype=dtype)


def _fake_backward(grad_BKP, ids_keep_BK, shape, patch_size, dtype):
    return grad_BKP.new_empty(shape, dtype=dtype)


def _save(ctx, inputs, output):
    images_BCHW, ids_keep_BK, ctx.patch_size, _, _ = inputs
    ctx.shape, ctx.dtype = images_BCHW.shape, images_BCHW.dtype
    ctx.save_for_backward(ids_keep_BK)


def _backward(ctx, grad_BKP):
    return patch_gather_grad(grad_BKP, *ctx.saved_tensors, ctx.shape, ctx.patch_size, ctx.dtype), None, None, None, None


patch_gather = register(
    "patch_gather",
    "(Tensor images, Tensor ids_keep, int patch_size, float offset, ScalarType dtype) -> Tensor",
    patch_gather_forward,
    _fake_forward,
    gradient=(_save, _backward),
)
patch_gather_grad = register(
    "patch_gather_grad",
    "(Tensor grad, Tensor ids_keep, SymInt[] shape, int patch_size, ScalarType dtype) -> Tensor",
    patch_gather_backward,
    _fake_backward,
)


def launches() -> list[Launch]:
    def call(patch: int, storage: torch.dtype, dtype: torch.dtype):
        side = 224 if 224 % patch == 0 else 4 * patch
        L = (side // patch) ** 2
        ids_BK = empty(8, L // 4, dtype=torch.int64)
        patches_BKP = patch_gather_forward(empty(8, 3, side, side, dtype=storage), ids_BK, patch, 0.5, dtype)
        if storage != torch.uint8:
            patch_gather_backward(patches_BKP, ids_BK, [8, 3, side, side], patch, storage)

    # Rows of a patch of side 2, 4 (in 16 bits) or 14 are shorter than 16 bytes, or no multiple of them.
    narrow = frozenset(["_gather_kernel", "_scatter_kernel"])
    cases = [(f"p{p}", name, (p, dtype, dtype), narrow) for p in (2, 4, 14) for name, dtype in STORAGE.items()]
    cases += [(f"p{p}", name, (p, dtype, dtype), frozenset()) for p in (8, 16) for name, dtype in STORAGE.items()]
    cases += [("p16 to bf16", "fp32", (16, torch.float32, torch.bfloat16), frozenset())]
    # A thread's 8 numbers are 8 bytes in uint8.
    cases += [("p16 to bf16", "uint8", (16, torch.uint8, torch.bfloat16), narrow)]
    return [Launch(config, name, partial(call, *arguments), narrow) for config, name, arguments, narrow in cases]
