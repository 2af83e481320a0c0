"""Attention over a short sequence.  Shapes: B batch, T tokens, N heads, d numbers per head, D = N*d, Q = 3*D."""

import torch
from torch import Tensor

from mimir_fast.kernels._shared.registration import check_storage, choose
from mimir_fast.kernels.short_attention import reference

# Bytes per number -> numbers per head, at most -> tokens, at most.  Longer sequences spill registers on A100 or H100.
LONGEST = {2: {16: 512, 32: 128, 64: 208, 128: 80}, 4: {16: 128, 32: 64, 64: 64}}


def supported(tokens: int, head_dim: int, dtype: torch.dtype = torch.bfloat16) -> bool:
    """Whether impl="triton" takes sequences of this length with heads of this width."""
    limits = LONGEST.get(dtype.itemsize, {})
    return 1 <= tokens <= next((longest for width, longest in limits.items() if head_dim <= width), 0)


def short_attention(
    qkv_BTQ: Tensor, num_heads: int, impl: str = "auto", query_start: int = 0, bias_Q: Tensor | None = None
) -> Tensor:
    """Softmax self-attention over a short sequence, from the packed qkv projection to the heads' concatenated output.

    formula      per image and head: out = softmax(q k^T / sqrt(d)) v of the tokens from query_start on, all tokens being keys
                 and values; no mask, no dropout
    shapes       qkv [B,T,3*N*d], for each token q of all heads, then k, then v -> [B,T-query_start,N*d]; differentiable in qkv
                 and in bias [3*N*d]
    dtypes       output in qkv's dtype; scores, softmax and sums in fp32, the second product's weights rounded to storage (fp32
                 storage: products as three tf32 products); autocast is off inside
    bytes        in units of the output: qkv 3 read, the output 1 written; backward: qkv 3 and the output's gradient 1 read,
                 qkv's gradient 3 written; of more than 64 tokens also the output 1 read, and an fp32 number per token and
                 head written and read; for bias an fp32 row per image written and read (fp32 storage: qkv's gradient read).
                 Kept for the backward pass are qkv, and of more than 64 tokens the output and those numbers
    determinism  fixed order, no atomics
    source       Vaswani et al., Attention Is All You Need, 2017, section 3.2; the gradient's row sums as in Dao et al.,
                 FlashAttention, 2022, appendix B

    bias_Q: what was added to every token's row to make qkv, by a linear layer that was given bias.detach(), say.  It is not
    read; its gradient, the sum of qkv's over images and tokens, is taken here, where that gradient is in registers.
    impl: "triton" (fp32, fp16 and bf16; sizes for which `supported(T, d, dtype)`), "reference" or "auto" (triton on CUDA).
    triton copies qkv that is not contiguous; heads narrower than 16 are computed several at a time, so that a number that is
    not finite may spread to the neighbouring heads.
    Raises ValueError if qkv is no float [B,T,3*D], num_heads does not divide D, no token is a query, bias is not [3*D], or
    the size, an element type or impl is not on offer.
    """
    if qkv_BTQ.ndim != 3 or qkv_BTQ.shape[1] < 1 or qkv_BTQ.shape[2] % 3 or not qkv_BTQ.is_floating_point():
        raise ValueError(f"qkv: expected float [B,T,3*D] with T >= 1, got {qkv_BTQ.dtype} {tuple(qkv_BTQ.shape)}")
    T, D = qkv_BTQ.shape[1], qkv_BTQ.shape[2] // 3
    if num_heads < 1 or D < 1 or D % num_heads:
        raise ValueError(f"num_heads: expected a divisor of the width {D}, got {num_heads}")
    if not 0 <= query_start < T:
        raise ValueError(f"query_start: expected 0 to {T - 1} of {T} tokens, got {query_start}")
    if bias_Q is not None and bias_Q.shape != qkv_BTQ.shape[2:]:
        raise ValueError(f"bias: expected [{qkv_BTQ.shape[2]}], got {tuple(bias_Q.shape)}")
    if choose(impl, qkv_BTQ) == "triton":
        check_storage(qkv=qkv_BTQ)
        if not supported(T, D // num_heads, qkv_BTQ.dtype):
            limits = LONGEST[qkv_BTQ.dtype.itemsize].items()
            longest = ", ".join(f"T <= {tokens} for d <= {width}" for width, tokens in limits)
            raise ValueError(f"qkv: triton takes {longest} in {qkv_BTQ.dtype}; got T={T}, d={D // num_heads}")
        # Imported here, since CPU-only installations have no Triton.
        from mimir_fast.kernels.short_attention import kernel

        return kernel.short_attention(qkv_BTQ, bias_Q, num_heads, query_start)[0]
    return reference.short_attention(qkv_BTQ, num_heads, query_start, bias_Q)
