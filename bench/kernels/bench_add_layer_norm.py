"""add_layer_norm: between two branches of a block, encoder and decoder; weights fp32, the residual stream in the dtype."""

import torch

from bench.kernels.suite import Size
from mimir_fast.kernels import add_layer_norm
from tests.support.cases import DTYPES, Case


def cases(size: Size, dtype: str) -> list[Case]:
    encoder, decoder = (1 + size.K, size.D), (1 + size.L, size.E)
    return [_case("encoder", size.B, *encoder, dtype), _case("decoder", size.B, *decoder, dtype)]


def _case(part: str, B: int, T: int, D: int, dtype: str) -> Case:
    def draw(device: torch.device) -> dict:
        x, delta = (torch.randn(B, T, D, device=device).to(DTYPES[dtype]) for _ in range(2))
        bias, weight, shift = torch.randn(3, D, device=device)
        tensors = {"x": x, "delta": delta, "delta_bias_D": bias.to(delta.dtype), "weight_D": weight, "bias_D": shift}
        return {name: tensor.detach().clone().requires_grad_() for name, tensor in tensors.items()}

    return Case("add_layer_norm", {"B": B, "T": T, "D": D}, dtype, draw, add_layer_norm, part=part)
