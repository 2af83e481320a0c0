"""Self-attention from a packed projection, by backend.  Shapes: B batch, T tokens, N heads, d numbers per head, D = N*d.

A backend is a function (qkv_BTQ, num_heads, query_start) -> [B,T-query_start,D]; qkv [B,T,3*D] holds q, k and v, head by
head.  Backends are chosen by name, or were measured (mimir_fast/tuning): a name for each number of tokens.
"""

from collections.abc import Callable
from functools import partial
from importlib.util import find_spec

import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from mimir_fast.config.choices import ATTENTION, SDPA_BACKENDS
from mimir_fast.kernels import short_attention
from mimir_fast.kernels.short_attention.op import supported
from mimir_fast.models import narrow_attention

# A name, or names by the number of tokens, with that for all other numbers under 0.
Backend = str | dict[int, str]
# Up to this many tokens plain matrix products are faster on a CPU than sdpa's tiles.
FEW_TOKENS = 64
# Of SDPA_BACKENDS, in their order.
SDPA_KERNELS = (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION)
# Module -> its name for pip, which is also that of our extra.
PACKAGES = {"flash_attn": "flash-attn", "xformers": "xformers"}


def check_backend(name: str) -> None:
    """Raise ValueError if the backend is unknown or its package is not installed."""
    if name not in ATTENTION:
        raise ValueError(f"attention: expected one of {', '.join(ATTENTION)}, got {name!r}")
    if name in PACKAGES and find_spec(name) is None:
        raise ValueError(
            f"attention: {name} needs the package {PACKAGES[name]}: pip install 'mimir-fast[{PACKAGES[name]}]'"
        )


def attention(qkv_BTQ: Tensor, num_heads: int, query_start: int = 0, backend: Backend = "auto") -> Tensor:
    """softmax(q k^T / sqrt(d)) v of every head: [B,T,3*D] -> [B,T-query_start,D].

    All tokens are keys and values; only tokens[query_start:] are queries.  auto: torch's scaled_dot_product_attention.
    """
    return _FUNCTIONS[_named(backend, qkv_BTQ.shape[1])](qkv_BTQ, num_heads, query_start)


def projected_attention(
    x_BTD: Tensor, weight_QD: Tensor, bias_Q: Tensor | None, num_heads: int, query_start: int, backend: Backend
) -> Tensor:
    """`attention` of the packed projection of x [B,T,D]: weight [3*D,D], bias [3*D]."""
    T, d = x_BTD.shape[1], x_BTD.shape[2] // num_heads
    if bias_Q is None or _named(backend, T) != "short" or not supported(T, d, x_BTD.dtype):
        return attention(F.linear(x_BTD, weight_QD, bias_Q), num_heads, query_start, backend)
    # Our kernel sums the bias's gradient where it has qkv's in registers; the linear layer would read that again.
    qkv_BTQ = F.linear(x_BTD, weight_QD, bias_Q.detach())
    return short_attention(qkv_BTQ, num_heads, "triton", query_start, bias_Q)


def _named(backend: Backend, tokens: int) -> str:
    return backend if isinstance(backend, str) else backend.get(tokens, backend[0])


def _split(qkv_BTQ: Tensor, num_heads: int) -> tuple[Tensor, ...]:
    """q, k, v, each [B,T,N,d]."""
    return qkv_BTQ.unflatten(2, (3, num_heads, -1)).unbind(2)


def _sdpa(qkv_BTQ: Tensor, num_heads: int, query_start: int) -> Tensor:
    q, k, v = (t.transpose(1, 2) for t in _split(qkv_BTQ, num_heads))
    return F.scaled_dot_product_attention(q[:, :, query_start:], k, v).transpose(1, 2).flatten(2)


def _sdpa_by(kernel: SDPBackend, qkv_BTQ: Tensor, num_heads: int, query_start: int) -> Tensor:
    """sdpa by one kernel.  Raises RuntimeError for a size, dtype or device that it does not take."""
    with sdpa_kernel(kernel):
        return _sdpa(qkv_BTQ, num_heads, query_start)


def _short(qkv_BTQ: Tensor, num_heads: int, query_start: int) -> Tensor:
    """Our kernel short_attention, which needs no transposition around it; sdpa for sizes that it does not offer."""
    if not supported(qkv_BTQ.shape[1], qkv_BTQ.shape[2] // 3 // num_heads, qkv_BTQ.dtype):
        return _sdpa(qkv_BTQ, num_heads, query_start)
    return short_attention(qkv_BTQ, num_heads, "triton", query_start)


def _narrow(qkv_BTQ: Tensor, num_heads: int, query_start: int) -> Tensor:
    """For fp32 on a CPU: compiled loops for narrow heads, matrix products for short sequences, sdpa for all others."""
    if narrow_attention.supported(qkv_BTQ.shape[2] // 3 // num_heads, qkv_BTQ):
        return narrow_attention.narrow_attention(qkv_BTQ, num_heads, query_start)
    plain = qkv_BTQ.device.type == "cpu" and qkv_BTQ.shape[1] <= FEW_TOKENS
    return (_math if plain else _sdpa)(qkv_BTQ, num_heads, query_start)


def _math(qkv_BTQ: Tensor, num_heads: int, query_start: int) -> Tensor:
    q, k, v = (t.transpose(1, 2) for t in _split(qkv_BTQ, num_heads))
    # q is scaled and not the scores: T*d numbers instead of T*T.
    weights = (q[:, :, query_start:] * q.shape[-1] ** -0.5) @ k.transpose(2, 3)
    return (weights.softmax(dim=-1) @ v).transpose(1, 2).flatten(2)


def _flash_attn(qkv_BTQ: Tensor, num_heads: int, query_start: int) -> Tensor:
    from flash_attn import flash_attn_kvpacked_func, flash_attn_qkvpacked_func

    # flash-attn wants [B,T,3,N,d], which is how the projection packs its outputs: a view.
    qkv = qkv_BTQ.unflatten(2, (3, num_heads, -1))
    if not query_start:
        return flash_attn_qkvpacked_func(qkv).flatten(2)
    return flash_attn_kvpacked_func(qkv[:, query_start:, 0], qkv[:, :, 1:]).flatten(2)


def _xformers(qkv_BTQ: Tensor, num_heads: int, query_start: int) -> Tensor:
    from xformers.ops import memory_efficient_attention

    # xformers takes [B,T,N,d]: nothing to transpose before or after.
    q, k, v = _split(qkv_BTQ, num_heads)
    return memory_efficient_attention(q[:, query_start:], k, v).flatten(2)


_FUNCTIONS: dict[str, Callable[[Tensor, int, int], Tensor]] = {
    "auto": _sdpa,
    "short": _short,
    "narrow": _narrow,
    "sdpa": _sdpa,
    **{name: partial(_sdpa_by, kernel) for name, kernel in zip(SDPA_BACKENDS, SDPA_KERNELS)},
    "flash_attn": _flash_attn,
    "xformers": _xformers,
    "math": _math,
}
