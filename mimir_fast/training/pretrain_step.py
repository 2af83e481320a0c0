"""Pre-training step: attack, reconstruction and penalty of a micro-batch, in the order of the data.

Shapes: B batch, C channels, H W sides, L patches.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from mimir_fast.attacks.pgd_mae import MaeAttackFunctions, ascend_reconstruction
from mimir_fast.models import MaskedAutoencoder
from mimir_fast.objectives.reconstruction import PretrainOutput
from mimir_fast.training.stages import stage


class MaeNoise(NamedTuple):
    """Every random draw of a step.

    start          a seed (one int64 number) of the attack's start noise, or that noise itself [B,C,H,W]
    attack_masks   noise [B,L] for every attack step; the patches with the smallest entries are kept
    train_mask     the same [B,L] for the training pass
    plans          of the attack's masks and of the training's, for a model with masks_on_host; else none
    """

    start: Tensor
    attack_masks: list[Tensor]
    train_mask: Tensor
    plans: tuple[Tensor, ...] = ()


class MaeAttack(NamedTuple):
    """The PGD-MAE attack on training images.

    steps        None: no attack, a plain masked autoencoder
    bounds       [4,C] eps, alpha, lo, hi of every channel, from attack_bounds; None without an attack
    loss_scale   for fp16
    """

    steps: int | None = None
    bounds: Tensor | None = None
    mask_ratio: float = 0.75
    loss_scale: float = 1.0


def start_seed(generator: torch.Generator) -> Tensor:
    """A seed of an attack's start noise, on the generator's device."""
    return torch.randint(2**63 - 1, (), device=generator.device, generator=generator)


def draw_noise(generator: torch.Generator, rows: int, num_patches: int, attack: MaeAttack) -> MaeNoise:
    """Draw a step's randomness on the generator's device: start, attack masks, training mask.

    rows, num_patches: noise_shape of the model, a row per image or one for all.
    """
    start, count = start_seed(generator), (attack.steps or 0) + 1
    masks = torch.rand(count, rows, num_patches, device=generator.device, generator=generator)
    return MaeNoise(start, list(masks[:-1]), masks[-1])


def pretrain_step(
    objective: nn.Module,
    model: MaskedAutoencoder,
    images: Tensor,
    noise: MaeNoise,
    attack: MaeAttack,
    functions: MaeAttackFunctions | None = None,
) -> PretrainOutput:
    """Attack, encode, decode, loss and penalty of one micro-batch; the caller runs the backward pass.

    objective    a ReconstructionObjective, possibly wrapped in DDP
    model        the model that the attack runs on: the objective's, or its frozen_twin where the functions are compiled
    images       [B,C,H,W] floats or uint8, clean; the loss reconstructs them from their adversarial version
    Raises ValueError for an attack without bounds.
    """
    if attack.steps is None:
        return objective(images, None, noise.train_mask, *noise.plans)
    if attack.bounds is None:
        raise ValueError("bounds: an attack needs [4,C], got None")
    with stage("attack"):
        adv = ascend_reconstruction(
            model,
            images,
            attack.bounds,
            attack.steps,
            mask_ratio=attack.mask_ratio,
            start=noise.start,
            mask_noise=noise.attack_masks,
            loss_scale=attack.loss_scale,
            functions=functions,
            # The last one is the training mask's.
            plans=noise.plans[:-1] or None,
        )
    return objective(images, adv, noise.train_mask, *noise.plans[-1:])
