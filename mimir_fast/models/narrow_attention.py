"""Attention of narrow heads on a CPU, in fp32: loops over pairs of tokens that Inductor writes, nothing stored for a pair.

A decoder's heads have 8 numbers.  torch's own CPU attention calls a matrix product per head and block, which at that width is
mostly overhead; here the 8 products of a pair are taken one by one, in registers, all keys of a query in the inner loop.

Shapes: B batch, T tokens, the last R of them are queries, N heads, d numbers per head; Q = 3*N*d packed as q, k, v.  q, k, v
and what belongs to them are [B,N,d,tokens], so that neighbouring tokens are neighbours in memory.
"""

import math
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

WIDEST = 8  # numbers per head, a decoder's: beyond, compiling takes minutes and matrix products win
# a loop's whole body stays inside of it, however often a value is read; multiply-adds may be fused
INLINE = {
    "realize_reads_threshold": 10**6,
    "realize_acc_reads_threshold": 10**6,
    "realize_opcount_threshold": 10**6,
    "cpp.enable_floating_point_contract_flag": "fast",
}
# 2^f = sum of EXP2[i] f^(5-i) for 0 <= f < 1, with the least relative error of that degree, 7.5e-8
EXP2 = (0.0018775767, 0.0089893397, 0.055826318, 0.24015361, 0.69315308, 0.99999994)


def supported(head_dim: int, tensor: Tensor) -> bool:
    """Whether `narrow_attention` is for heads of this width in this tensor."""
    return head_dim <= WIDEST and tensor.device.type == "cpu" and tensor.dtype == torch.float32


@torch.library.custom_op("mimir_fast::narrow_attention", mutates_args=(), device_types="cpu")
def _attend(qkv_BTQ: Tensor, num_heads: int, query_start: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Mixed values [B,R,N*d] and for the backward q, k, v and log2 of the softmax's denominators [B,N,R]."""
    q, k, v = qkv_BTQ.chunk(3, dim=2)
    scale = math.log2(math.e) / math.sqrt(q.shape[2] // num_heads)
    heads = _heads(q[:, query_start:], num_heads, scale), _heads(k, num_heads), _heads(v, num_heads)
    out, lse_BNR = _run(_forward, *heads)
    return out.permute(0, 3, 1, 2).flatten(2).contiguous(), *heads, lse_BNR


@torch.library.custom_op("mimir_fast::narrow_attention_grad", mutates_args=(), device_types="cpu")
def _attend_grad(grad_BRD: Tensor, out_BRD: Tensor, q: Tensor, k: Tensor, v: Tensor, lse_BNR: Tensor) -> Tensor:
    """Gradient in qkv, [B,T,Q]; q, k, v as the forward made them."""
    B, N, d, T = k.shape
    mean_BNR = (grad_BRD * out_BRD).unflatten(2, (N, d)).sum(3).transpose(1, 2).contiguous()
    grads = _run(_backward, q, k, v, _heads(grad_BRD, N), mean_BNR, lse_BNR)
    grad_qkv = grad_BRD.new_empty(B, T, 3, N, d)
    grad_qkv[:, : T - q.shape[3], 0] = 0
    for i, grad in enumerate(grads):
        grad_qkv[:, T - grad.shape[3] :, i] = grad.permute(0, 3, 1, 2)
    return grad_qkv.flatten(2)


def narrow_attention(qkv_BTQ: Tensor, num_heads: int, query_start: int) -> Tensor:
    """softmax(q k^T / sqrt(d)) v of every head: [B,T,3*N*d] -> [B,T-query_start,N*d], fp32 on the CPU; differentiable once.

    Raises RuntimeError where no C++ compiler is found.  The first call at a shape compiles, in both directions.
    """
    return _attend(qkv_BTQ, num_heads, query_start)[0]


def _run(function: Callable, *tensors: Tensor) -> list[Tensor]:
    """function(*tensors) through Inductor."""
    return _compiled(function, *(t.shape for t in tensors))(*tensors)


@cache
def _compiled(function: Callable, *shapes: torch.Size) -> Callable:
    """The function for contiguous tensors of these shapes; torch.compile's clocks see it compile."""
    from torch._dynamo.callback import CallbackTrigger, callback_handler

    with callback_handler.install_callbacks(CallbackTrigger.DYNAMO, function.__name__), FakeTensorMode():
        inputs: list[Any] = [torch.empty(shape) for shape in shapes]
        return torch._inductor.compile(make_fx(function)(*inputs), inputs, INLINE)


def _heads(x_BTD: Tensor, num_heads: int, scale: float = 1.0) -> Tensor:
    """scale * x [B,T,N*d] as [B,N,d,T], contiguous."""
    x = x_BTD.unflatten(2, (num_heads, -1)).permute(0, 2, 3, 1)
    return torch.mul(x, scale, out=torch.empty(x.shape, dtype=x.dtype, device=x.device))


def _exp2(x: Tensor) -> Tensor:
    """2^x for x <= 0, to 2e-7; what underflows comes out as 2^-126 at most."""
    x = x.clamp(min=-126.0)
    whole = x.floor()
    part = x - whole
    power = torch.full_like(part, EXP2[0])
    for factor in EXP2[1:]:
        power = power * part + factor
    return ((whole.to(torch.int32) + 127) << 23).view(torch.float32) * power


def _products(a: Tensor, b: Tensor) -> Tensor:
    """Every column of a [B,N,d,X] with every column of b [B,N,d,Y]: [B,N,X,Y]."""
    total = a[:, :, 0, :, None] * b[:, :, 0, None, :]
    for c in range(1, a.shape[2]):
        total = total + a[:, :, c, :, None] * b[:, :, c, None, :]
    return total


def _mix(weights: Tensor, b: Tensor) -> Tensor:
    """Sums of b's columns [B,N,d,Y] with weights [B,N,X,Y]: [B,N,d,X]."""
    return torch.stack([(weights * b[:, :, c, None, :]).sum(-1) for c in range(b.shape[2])], dim=2)


def _forward(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Mixed values [B,N,d,R] and log2 of the softmax's denominators [B,N,R]."""
    scores = _products(q, k)
    highest = scores.amax(-1)
    weights = _exp2(scores - highest[..., None])
    total = weights.sum(-1)
    return _mix(weights, v) / total[:, :, None], highest + total.log2()


def _backward(q: Tensor, k: Tensor, v: Tensor, grad: Tensor, mean: Tensor, lse: Tensor) -> tuple[Tensor, ...]:
    """Gradients in the unscaled q, k and v; mean [B,N,R] is grad . out.

    The weights are computed twice: with the keys of a query in the inner loop, and with the queries of a key.
    """
    weights = _exp2(_products(q, k) - lse[..., None])
    dq = _mix(weights * (_products(grad, v) - mean[..., None]), k) / math.sqrt(q.shape[2])
    weights = _exp2(_products(k, q) - lse[:, :, None])
    dk = _mix(weights * (_products(v, grad) - mean[:, :, None]), q) * math.log(2)
    return dq, dk, _mix(weights, grad)


@_attend.register_fake
def _(qkv_BTQ, num_heads, query_start):
    B, T, Q = qkv_BTQ.shape
    heads = [qkv_BTQ.new_empty(B, num_heads, Q // 3 // num_heads, tokens) for tokens in (T - query_start, T, T)]
    return qkv_BTQ.new_empty(B, T - query_start, Q // 3), *heads, qkv_BTQ.new_empty(B, num_heads, T - query_start)


@_attend_grad.register_fake
def _(grad_BRD, out_BRD, q, k, v, lse_BNR):
    B, N, d, T = k.shape
    return grad_BRD.new_empty(B, T, 3 * N * d)


def _save(ctx, inputs, output):
    ctx.save_for_backward(*output)
    ctx.mark_non_differentiable(*output[1:])


def _differentiate(ctx, grad_BRD, *_):
    return _attend_grad(grad_BRD, *ctx.saved_tensors), None, None


_attend.register_autograd(_differentiate, setup_context=_save)
