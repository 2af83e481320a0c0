"""Recorded fixtures and the small model they were recorded with."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file

from mimir_fast.attacks.pgd_mae import linf_bounds
from mimir_fast.models import MaskedAutoencoderViT

BOUNDS = linf_bounds(8 / 255, 10 / 255, 0.0, 1.0, 3, "cpu")  # eps, alpha, lo, hi
GOLDEN = Path(__file__).parents[1] / "golden"
SMALL = {
    "img_size": 32,
    "patch_size": 4,
    "embed_dim": 48,
    "depth": 2,
    "num_heads": 3,
    "decoder_embed_dim": 32,
    "decoder_depth": 1,
    "decoder_num_heads": 4,
    "mlp_ratio": 4.0,
}


def load_golden(name: str) -> tuple[dict, dict]:
    """Tensors and scalars of one recorded fixture; either may be empty."""
    tensors, scalars = GOLDEN / f"{name}.safetensors", GOLDEN / f"{name}.json"
    return (
        load_file(tensors) if tensors.exists() else {},
        json.loads(scalars.read_text()) if scalars.exists() else {},
    )


def small_model(
    norm_pix_loss: bool = True,
    dtype: torch.dtype = torch.float32,
    kernels: str = "auto",
    attention: str | None = None,
) -> MaskedAutoencoderViT:
    """The recorded model, with its recorded parameters; kernels="triton" includes attention unless one is named."""
    attention = attention or ("short" if kernels == "triton" else "auto")
    model = MaskedAutoencoderViT(**SMALL, norm_pix_loss=norm_pix_loss, kernels=kernels, attention=attention)
    model.load_state_dict(load_golden("mae_state")[0], strict=True)
    return model.to(dtype)


def golden_images() -> torch.Tensor:
    """[4,B,3,H,W] in [0,1]."""
    return load_golden("images")[0]["images_u8"].float() / 255


def relative_error(value: torch.Tensor, truth: torch.Tensor) -> float:
    """|value - truth| / |truth| in the L2 norm, in float64."""
    return ((value.double() - truth.double()).norm() / truth.double().norm()).item()
