"""Layer-wise learning-rate decay: the closer a layer is to the image, the smaller its learning rate."""

import torch
from torch import nn

from mimir_fast.config.choices import ORIGINAL
from mimir_fast.models.families import family_of
from mimir_fast.models.family import Family, matches
from mimir_fast.training.optimizer import ADAM_EPS

BETAS = (0.9, 0.999)


def parameter_groups(
    model: nn.Module,
    weight_decay: float,
    layer_decay: float,
    family: Family | None = None,
    decay_tables: bool = False,
) -> list[dict]:
    """One group per layer and kind in order of first appearance, with lr_scale = layer_decay^(depth + 1 - layer).

    The layers are those of the model's family, or of `family` for a model by others with the same names of parameters.
    Vectors are not decayed, and what the family names (ViT: the class token and the positional table) only with decay_tables.
    Order and grouping are part of the checkpoint format.
    Raises ValueError unless 0 < layer_decay <= 1.
    """
    if not 0 < layer_decay <= 1:
        raise ValueError(f"layer_decay: expected 0 < decay <= 1, got {layer_decay}")
    family = family or family_of(model)
    depth = family.depth(model)
    # A model by others has no compat.
    original = getattr(model, "compat", None) == ORIGINAL
    undecayed = tuple(p for p in family.undecayed if not (original and p in family.original_decays))
    groups: dict[tuple[int, bool], dict] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        layer = family.layer_of(name, model)
        decayed = parameter.ndim > 1 and (decay_tables or not matches(name, undecayed))
        new = {
            "params": [],
            "weight_decay": weight_decay if decayed else 0.0,
            # Clark et al., ELECTRA, 2020; for image Transformers Bao et al., BEiT, 2022.
            "lr_scale": layer_decay ** (depth + 1 - layer),
        }
        groups.setdefault((layer, decayed), new)["params"].append(parameter)
    return list(groups.values())


def build_optimizer(
    model: nn.Module,
    lr: float,
    weight_decay: float,
    layer_decay: float,
    family: Family | None = None,
    decay_tables: bool = False,
) -> torch.optim.AdamW:
    """AdamW over `parameter_groups`."""
    # Fused: it can skip a step by a flag on the device.
    groups = parameter_groups(model, weight_decay, layer_decay, family, decay_tables)
    return torch.optim.AdamW(groups, lr=lr, betas=BETAS, eps=ADAM_EPS, fused=True)
