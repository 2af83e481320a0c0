"""The residual step of a pre-norm Transformer.  Shapes: ... any leading dimensions, D width; a row is one token's D numbers."""

import torch
from torch import Tensor

from mimir_fast.kernels._shared.registration import check_floats, check_storage, choose
from mimir_fast.kernels.add_layer_norm import reference


def add_layer_norm(
    x: Tensor,
    delta: Tensor | None,
    delta_bias_D: Tensor | None,
    weight_D: Tensor,
    bias_D: Tensor,
    eps: float = 1e-6,
    out_dtype: torch.dtype | None = None,
    impl: str = "auto",
    keep_B: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Residual addition and LayerNorm: add a branch, and the bias of its last linear layer, to x; normalise the sum.

    formula      s = x + (delta + delta_bias) * keep; n = (s - mean(s)) / sqrt(var(s) + eps) * weight + bias, mean and
                 (biased) variance over D; without keep 1 in its place; without delta s is x itself, not a copy
    shapes       x, delta [...,D], delta_bias, weight, bias [D] -> s, n [...,D]; differentiable in all five; keep [B], the
                 factors of stochastic depth for x [B,...,D], is not differentiated
    dtypes       s in x's dtype, n in out_dtype (default: autocast's where it is on, else delta's, else x's); arithmetic and
                 statistics in fp32, of the sum as it is stored; autocast is off inside
    bytes        x and delta read, s and n written, two fp32 per row written; backward: the gradients of s and n, s and the two
                 numbers read, the gradient of x written, delta's if its dtype is another or keep is there; per group of rows
                 one fp32 row for each of weight, bias and delta_bias written and read (none where they need no gradient)
    determinism  fixed order, no atomics; groups depend on the shape alone, not on the device
    source       Ba et al., Layer Normalization, 2016; the residual step of Xiong et al., On Layer Normalization in the
                 Transformer Architecture, 2020

    impl: "triton", "reference" or "auto" (triton on CUDA).  triton takes float storage up to 32 bits and reads x [B,T,D] with
    any strides between rows; other arguments that are not contiguous are copied, and x in the backward pass without delta.
    Raises ValueError if shapes or devices disagree, x has no element, delta_bias or keep comes without delta, or an element
    type or impl is not on offer.
    """
    D = _check_shapes(x, delta, delta_bias_D)
    _check_keep(x, delta, keep_B)
    for name, tensor in (("weight", weight_D), ("bias", bias_D)):
        if tensor.shape != (D,):
            raise ValueError(f"{name}: expected [{D}], got {tuple(tensor.shape)}")
    if out_dtype is None:
        device, own = x.device.type, (x if delta is None else delta).dtype
        # The norm is followed by a linear layer, which autocast would cast to this type anyway.
        out_dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else own
    if not out_dtype.is_floating_point:
        raise ValueError(f"out_dtype: expected a float type, got {out_dtype}")
    given = {"x": x, "delta": delta, "delta_bias": delta_bias_D, "weight": weight_D, "bias": bias_D, "keep": keep_B}
    tensors = {name: tensor for name, tensor in given.items() if tensor is not None}
    check_floats(x.device, **tensors)
    if choose(impl, x) == "triton":
        # Imported here, since CPU-only installations have no Triton.
        from mimir_fast.kernels.add_layer_norm import kernel

        check_storage(**tensors)
        if out_dtype.itemsize > 4:
            raise ValueError(f"out_dtype: the triton implementation writes fp32, fp16 or bf16, got {out_dtype}")
        s, n, _ = kernel.add_layer_norm(x, delta, delta_bias_D, weight_D, bias_D, eps, out_dtype, keep_B)
        # An operator must not return its argument: without delta its s is empty.
        return (x if delta is None else s), n
    return reference.add_layer_norm(x, delta, delta_bias_D, weight_D, bias_D, eps, out_dtype, keep_B)


def _check_shapes(x: Tensor, delta: Tensor | None, delta_bias_D: Tensor | None) -> int:
    """The width D, if the shapes agree."""
    if x.ndim < 1 or not x.is_floating_point() or x.numel() < 1:
        raise ValueError(f"x: expected float [...,D] with one row or more, got {x.dtype} {tuple(x.shape)}")
    if delta is not None and delta.shape != x.shape:
        raise ValueError(f"delta: expected {tuple(x.shape)} like x, got {tuple(delta.shape)}")
    if delta_bias_D is not None and delta is None:
        raise ValueError("delta_bias: it is added to delta; expected None without delta")
    if delta_bias_D is not None and delta_bias_D.shape != x.shape[-1:]:
        raise ValueError(f"delta_bias: expected [{x.shape[-1]}], got {tuple(delta_bias_D.shape)}")
    return x.shape[-1]


def _check_keep(x: Tensor, delta: Tensor | None, keep_B: Tensor | None) -> None:
    if keep_B is None:
        return
    if delta is None:
        raise ValueError("keep: it weights delta; expected None without delta")
    if keep_B.shape != x.shape[:1] or x.ndim < 2 or keep_B.requires_grad:
        raise ValueError(
            f"keep: expected [B] without a gradient for x [B,...,D], got {tuple(keep_B.shape)} for {tuple(x.shape)}"
        )
