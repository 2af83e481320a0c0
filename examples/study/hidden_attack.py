"""Pre-training whose attack reaches no visible patch, as that of the original at batch 512.

There the attack's gradient underflows in fp16 on all visible pixels (docs/fidelity.md): these keep their random start, and only
the pixels of removed patches are moved.
"""

from functools import partial

import torch
from torch import Tensor

from mimir_fast.attacks.pgd_mae import MaeAttackFunctions
from mimir_fast.cli.pretrain import PRETRAIN
from mimir_fast.cli.training import train
from mimir_fast.config.pretraining import PretrainConfig
from mimir_fast.config.resolve import Run
from mimir_fast.training.compilation import Compiler
from mimir_fast.training.distributed import World
from mimir_fast.training.loop import Loop
from mimir_fast.training.pretraining import Pretraining, build_data


def main(argv: list[str]) -> int:
    """Run a pre-training with the command line of `mimir-fast pretrain`; returns its exit status."""
    return train(PRETRAIN, argv, build_loop)


def build_loop(run: Run[PretrainConfig], world: World) -> Loop:
    return Loop(HiddenAttack(run, world, build_data(run, world)), world)


class HiddenAttack(Pretraining):
    """Pre-training with an attack that only the removed patches feel."""

    def attack_functions(self, compiler: Compiler) -> MaeAttackFunctions:
        functions = super().attack_functions(compiler)
        return functions._replace(step=partial(without_visible, functions.step))


def without_visible(step, images: Tensor, adv: Tensor, grad: Tensor, *others, **options) -> Tensor:
    """A step of the attack [B,C,H,W] with a gradient of zero at the visible patches [B,K,P]."""
    return step(images, adv, torch.zeros_like(grad), *others, **options)
