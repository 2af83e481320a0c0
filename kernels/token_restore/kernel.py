"""token_restore in Triton: one pass forward; backward, the mask token's gradient as a sum in two stages."""

from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from mimir_fast.kernels._shared.launch import FUSED, STORAGE, Launch, Prepared, empty, memoised
from mimir_fast.kernels._shared.patch_tile import NUM_WARPS, tile_block, tile_grid, tile_rows, tile_rows_of
from mimir_fast.kernels._shared.registration import register


@triton.jit
def _restore_kernel(tokens, mask_token, pos_embed, ids_shuffle, out, stride_b, stride_k, L, K, E: tl.constexpr):
    """formula      out[b,0] = tokens[b,0] + pos[0];
                 out[b,1+r] = (tokens[b,1+r] if r < K else mask_token) + pos[1+ids_shuffle[b,r]]
    shapes       tokens [B,1+K,E] with strides, mask_token [E], pos_embed [1+L,E], ids_shuffle [B,L] -> out [B,1+L,E]
    dtypes       any float storage, fp32 addition; the mask token is rounded to the tokens' dtype first
    bytes        tokens and indices once, mask token and position table once per image (from L2), out once
    determinism  exact
    source       He et al., Masked Autoencoders Are Scalable Vision Learners, 2022, section 3
    """
    image, row_R1 = tile_rows_of(L + 1, tile_rows(E))
    number_1N = tl.arange(0, tile_block(E))[None, :]
    exists_RN = (row_R1 <= L) & (number_1N < E)
    # Row 0 is the class token: -1 gives it position 0.
    patch_R1 = tl.load(ids_shuffle + image * L + row_R1 - 1, mask=(row_R1 > 0) & (row_R1 <= L), other=-1).to(tl.int32)
    token_RN = tokens + image * stride_b + row_R1.to(tl.int64) * stride_k + number_1N
    token_RN = tl.load(token_RN, mask=exists_RN & (row_R1 <= K), other=0)
    mask_1N = tl.load(mask_token + number_1N, mask=number_1N < E, other=0).to(tokens.dtype.element_ty)
    position_RN = tl.load(pos_embed + (1 + patch_R1) * E + number_1N, mask=exists_RN, other=0).to(tl.float32)
    restored_RN = tl.where(row_R1 <= K, token_RN, mask_1N).to(tl.float32) + position_RN
    tl.store(out + (image * (L + 1) + row_R1) * E + number_1N, restored_RN.to(out.dtype.element_ty), mask=exists_RN)


def token_restore_forward(
    tokens_BKE: Tensor, mask_token_E: Tensor, pos_embed_LE: Tensor, ids_shuffle_BL: Tensor
) -> Tensor:
    """The decoder's input [B,1+L,E]."""
    # Only the numbers of a token must be neighbours; images and tokens may have any strides.
    tokens_BKE = tokens_BKE if tokens_BKE.stride(2) == 1 else tokens_BKE.contiguous()
    dtype = torch.promote_types(tokens_BKE.dtype, pos_embed_LE.dtype)
    launch = _prepared_forward(tokens_BKE.shape, tokens_BKE.stride(), ids_shuffle_BL.shape[1], dtype)
    tables = mask_token_E.contiguous(), pos_embed_LE.contiguous(), ids_shuffle_BL.contiguous()
    (out_BLE,) = launch(tokens_BKE, *tables)
    return out_BLE


@memoised
def _prepared_forward(shape: torch.Size, strides: tuple[int, ...], L: int, dtype: torch.dtype) -> Prepared:
    """shape and strides of the tokens, dtype of the result."""
    B, kept, E = shape
    out, options = (B, L + 1, E), {"E": E, "num_warps": NUM_WARPS, **FUSED}
    return Prepared(_restore_kernel, tile_grid(*out), *strides[:2], L, kept - 1, results=[(out, dtype)], **options)


@triton.jit
def _mask_token_grad_kernel(grad, grad_mask, stride_b, stride_l, L, K, E: tl.constexpr):
    """formula      grad_mask[b] = sum of grad[b,1+r] over r >= K
    shapes       grad [B,1+L,E] with strides -> grad_mask [B,E] contiguous
    dtypes       any float storage; fp32 sums and grad_mask
    bytes        the removed patches' grad once, one fp32 row per image
    determinism  one program per image sums in a fixed order
    source       derivative of _restore_kernel
    """
    image = tl.program_id(0).to(tl.int64)
    ROWS: tl.constexpr = tile_rows(E)
    number_1N = tl.arange(0, tile_block(E))[None, :]
    sum_RN = tl.zeros([ROWS, tile_block(E)], tl.float32)
    for start in range(1 + K, L + 1, ROWS):
        row_R1 = start + tl.arange(0, ROWS)[:, None]
        exists_RN = (row_R1 <= L) & (number_1N < E)
        grad_RN = tl.load(grad + image * stride_b + row_R1.to(tl.int64) * stride_l + number_1N, mask=exists_RN, other=0)
        sum_RN += grad_RN.to(tl.float32)
    tl.store(grad_mask + image * E + number_1N, tl.sum(sum_RN, axis=0, keep_dims=True), mask=number_1N < E)


def mask_token_gradient(grad_BLE: Tensor, kept: int, dtype: torch.dtype) -> Tensor:
    """Gradient in the mask token [E]."""
    grad_BLE = grad_BLE if grad_BLE.stride(2) == 1 else grad_BLE.contiguous()
    (grad_mask_BE,) = _prepared_backward(grad_BLE.shape, grad_BLE.stride(), kept)(grad_BLE)
    return grad_mask_BE.sum(0).to(dtype)


@memoised
def _prepared_backward(shape: torch.Size, strides: tuple[int, ...], kept: int) -> Prepared:
    B, rows, E = shape
    results, options = [((B, E), torch.float32)], {"E": E, "num_warps": NUM_WARPS, **FUSED}
    return Prepared(_mask_token_grad_kernel, (B,), *strides[:2], rows - 1, kept, results=results, **options)


def _fake_forward(tokens_BKE, mask_token_E, pos_embed_LE, ids_shuffle_BL):
    dtype = torch.promote_types(tokens_BKE.dtype, pos_embed_LE.dtype)
    return tokens_BKE.new_empty((tokens_BKE.shape[0], *pos_embed_LE.shape), dtype=dtype)


def _save(ctx, inputs, output):
    tokens_BKE, mask_token_E, _, _ = inputs
    ctx.kept, ctx.dtypes = tokens_BKE.shape[1] - 1, (tokens_BKE.dtype, mask_token_E.dtype)


def _backward(ctx, grad_BLE):
    # A view of the upstream gradient, unless the dtype differs.
    of_tokens = grad_BLE[:, : 1 + ctx.kept].to(ctx.dtypes[0]) if ctx.needs_input_grad[0] else None
    of_mask = token_restore_grad(grad_BLE, ctx.kept, ctx.dtypes[1]) if ctx.needs_input_grad[1] else None
    return of_tokens, of_mask, None, None


token_restore = register(
    "token_restore",
    "(Tensor tokens, Tensor mask_token, Tensor pos_embed, Tensor ids_shuffle) -> Tensor",
    token_restore_forward,
    _fake_forward,
    gradient=(_save, _backward),
)
token_restore_grad = register(
    "token_restore_grad",
    "(Tensor grad, SymInt kept, ScalarType dtype) -> Tensor",
    mask_token_gradient,
    lambda grad, kept, dtype: grad.new_empty(grad.shape[2], dtype=dtype),
)


def launches() -> list[Launch]:
    def call(E: int, dtype: torch.dtype, table: torch.dtype):
        tokens_BKE, pos_embed_LE = empty(8, 50, E, dtype=dtype), empty(197, E, dtype=table)
        ids_shuffle_BL = empty(8, 196, dtype=torch.int64)
        mask_token_gradient(token_restore_forward(tokens_BKE, empty(E), pos_embed_LE, ids_shuffle_BL), 49, dtype)

    cases = [(f"E{E}", name, (E, dtype, dtype)) for E in (128, 512) for name, dtype in STORAGE.items()]
    cases += [
        ("E128 fp32 table", name, (128, dtype, torch.float32)) for name, dtype in STORAGE.items() if name != "fp32"
    ]
    # It writes one row per image.
    narrow = frozenset(["_mask_token_grad_kernel"])
    return [Launch(config, name, partial(call, *arguments), narrow) for config, name, arguments in cases]
