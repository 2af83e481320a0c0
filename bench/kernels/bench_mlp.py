"""mlp: two linear layers with GELU between them, encoder and decoder; everything in the dtype."""

import torch

from bench.kernels.suite import Size
from mimir_fast.kernels import mlp
from mimir_fast.kernels.mlp.op import supported
from tests.support.cases import DTYPES, Case

RATIO = 4  # hidden width to width


def cases(size: Size, dtype: str) -> list[Case]:
    encoder, decoder = (1 + size.K, size.D), (1 + size.L, size.E)
    return [_case("encoder", size.B, *encoder, dtype), _case("decoder", size.B, *decoder, dtype)]


def _case(part: str, B: int, T: int, D: int, dtype: str) -> Case:
    F = RATIO * D

    def draw(device: torch.device) -> dict:
        tensors = {
            "x": torch.randn(B, T, D, device=device),
            "weight1_FD": torch.randn(F, D, device=device) / D**0.5,
            "bias1_F": torch.randn(F, device=device),
            "weight2_DF": torch.randn(D, F, device=device) / F**0.5,
        }
        return {name: tensor.to(DTYPES[dtype]).requires_grad_() for name, tensor in tensors.items()}

    refused = "" if supported(D, F, DTYPES[dtype]) else f"not offered for D={D}, F={F} in {dtype}"
    return Case("mlp", {"B": B, "T": T, "D": D, "F": F}, dtype, draw, mlp, refused=refused, part=part)
