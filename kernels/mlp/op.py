"""The Transformer's MLP.  Shapes: D width, F hidden width."""

import torch
from torch import Tensor

from mimir_fast.kernels._shared.registration import check_floats, choose
from mimir_fast.kernels.mlp import reference

HALF = (torch.float16, torch.bfloat16)
# The kernels do not mask columns: widths are multiples of the largest tile of any GPU.
TILE_D, TILE_F = 64, 128


def supported(width: int, hidden: int, dtype: torch.dtype = torch.bfloat16) -> bool:
    """Whether impl="triton" takes these widths and this dtype: whole tiles of columns, 16 bits."""
    return dtype in HALF and width % TILE_D == 0 and hidden % TILE_F == 0


def mlp(x: Tensor, weight1_FD: Tensor, bias1_F: Tensor, weight2_DF: Tensor, impl: str = "auto") -> Tensor:
    """Transformer MLP: two linear layers with GELU between them, without the second one's bias (add_layer_norm adds it).

    formula      h = x weight1^T + bias1, a = gelu(h), result = a weight2^T; gelu(h) = h Phi(h), Phi the normal distribution
    shapes       x [...,D], weight1 [F,D], bias1 [F], weight2 [D,F] -> [...,D]; differentiable in all four
    dtypes       16-bit storage (reference: any float), fp32 accumulation and GELU of h as stored; under autocast everything
                 is cast to its type first
    bytes        those of the linear layers' products, and h written once and read once: GELU, its derivative and the sums of
                 bias1's gradient are computed on the products' tiles in registers
    determinism  fixed order; tiles depend on the GPU's generation only
    source       Hendrycks and Gimpel, Gaussian Error Linear Units, 2016; Vaswani et al., Attention Is All You Need, 2017

    impl: "triton" (where `supported(D, F, dtype)`: 16 bits, D a multiple of 64, F of 128), "reference" or "auto" (triton on
    CUDA where supported).
    Raises ValueError if shapes, devices or dtypes disagree, or an element type or impl is not on offer.
    """
    D, F = x.shape[-1], weight1_FD.shape[0]
    for name, tensor, shape in (
        ("weight1", weight1_FD, (F, D)), ("bias1", bias1_F, (F,)), ("weight2", weight2_DF, (D, F))
    ):  # fmt: skip
        if tensor.shape != shape:
            raise ValueError(f"{name}: expected {list(shape)}, got {tuple(tensor.shape)}")
    tensors = {"x": x, "weight1": weight1_FD, "bias1": bias1_F, "weight2": weight2_DF}
    check_floats(x.device, **tensors)
    # Autocast does not reach into a custom operator: its casts are made here.
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        tensors = {name: t.to(dtype) for name, t in tensors.items()}
    if impl == "auto" and not supported(D, F, tensors["x"].dtype):
        impl = "reference"
    if choose(impl, x) == "reference":
        return reference.mlp(*tensors.values())
    # Imported here, since CPU-only installations have no Triton.
    from mimir_fast.kernels.mlp import kernel

    for name, tensor in tensors.items():
        if tensor.dtype not in HALF or tensor.dtype != tensors["x"].dtype:
            raise ValueError(f"{name}: the triton implementation takes fp16 or bf16, one for all, got {tensor.dtype}")
    if not supported(D, F):
        raise ValueError(f"weight1: triton takes D a multiple of {TILE_D} and F of {TILE_F}, got D={D}, F={F}")
    return kernel.MLP.apply(*tensors.values())
