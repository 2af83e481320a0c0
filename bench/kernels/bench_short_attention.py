"""short_attention: the encoder's attention over visible tokens and the decoder's over all, in the trainer's backends too."""

from importlib.util import find_spec

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench.kernels.suite import Size
from bench.simulated_gpu import marker
from mimir_fast.kernels import short_attention
from mimir_fast.kernels.short_attention.op import supported
from mimir_fast.models.attention import PACKAGES, attention
from tests.support.cases import DTYPES, Case

HALF = ("bf16", "fp16")  # what the others' kernels take


def by_sdpa(backend: SDPBackend):
    def rival(qkv_BTQ: Tensor, num_heads: int) -> Tensor:
        with sdpa_kernel(backend):
            return attention(qkv_BTQ, num_heads, backend="sdpa")

    return rival


def by_package(name: str):
    return lambda qkv_BTQ, num_heads: attention(qkv_BTQ, num_heads, backend=name)


def rivals(dtype: str) -> dict:
    """Those of GPUs, which CPUs do not have; eager leaves the choice among torch's own to torch."""
    if not torch.cuda.is_available() or dtype not in HALF:
        return {}
    found = {"sdpa flash": by_sdpa(SDPBackend.FLASH_ATTENTION)}
    if not marker():  # it has no cuDNN
        found["sdpa cudnn"] = by_sdpa(SDPBackend.CUDNN_ATTENTION)
    return found | {name: by_package(name) for name in PACKAGES if find_spec(name)}


def cases(size: Size, dtype: str) -> list[Case]:
    encoder, decoder = (1 + size.K, size.D, size.N), (1 + size.L, size.E, size.R)
    return [_case("encoder", size.B, *encoder, dtype), _case("decoder", size.B, *decoder, dtype)]


def _case(part: str, B: int, T: int, D: int, N: int, dtype: str) -> Case:
    def draw(device: torch.device) -> dict:
        qkv = torch.randn(B, T, 3 * D, device=device).to(DTYPES[dtype])
        return {"qkv_BTQ": qkv.requires_grad_(), "num_heads": N}

    refused = "" if supported(T, D // N, DTYPES[dtype]) else f"not offered for T={T}, d={D // N} in {dtype}"
    shape = {"B": B, "T": T, "D": D, "N": N}
    return Case("short_attention", shape, dtype, draw, short_attention, rivals(dtype), refused, part=part)
