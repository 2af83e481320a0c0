"""The textbook's fine-tuning step for bench/step/variants.py: attack, forward, backward, update of one random batch.

The textbook is timm's own model, eager, with plain PGD.  Images and labels are on the device already; what mixes and augments
them belongs to the data pipeline.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from bench.textbook import textbook_adversarial_step, textbook_classifier
from mimir_fast.cli.finetune import FINETUNE
from mimir_fast.cli.parser import parse_args
from mimir_fast.config.finetuning import FinetuneConfig
from mimir_fast.config.resolve import DTYPES, resolve
from mimir_fast.models.families import find
from mimir_fast.training.layer_decay import build_optimizer
from mimir_fast.training.optimizer import Updater

RECIPE = "imagenet_vit_s"
LEARNING_RATE = 1e-4


def settled(words: list[str]) -> FinetuneConfig:
    """The fine-tuner's configuration from its own flags on top of the ImageNet recipe (PGD, 1 step at eps 4)."""
    run = resolve(*parse_args(FINETUNE, ["--recipe", RECIPE, *words]))
    return run.config.updated(run.flat())


def random_batch(config: FinetuneConfig, device: torch.device) -> tuple[Tensor, Tensor]:
    """images [B,3,S,S] in [0,1], labels [B] int64."""
    batch, side = config.optim.batch_size, config.model.input_size
    images = torch.rand(batch, 3, side, side, device=device)
    return images, torch.randint(config.model.nb_classes, (batch,), device=device)


def textbook(config: FinetuneConfig, images: Tensor, labels: Tensor) -> Callable[[], None]:
    """PGD whatever the configuration says, as many steps as it says."""
    m, a = config.model, config.attack
    sizes = find(m.model, pretraining=False)[1]
    model = textbook_classifier(m.input_size, m.patch_size, m.nb_classes, m.drop_path, **sizes).to(images.device)
    updater = _updater(config, model, images.device)
    numbers = (a.eps / 255, a.alpha / 255, a.steps, config.augment.smoothing)
    dtype = DTYPES[config.compute.precision]

    def step() -> None:
        with torch.autocast(images.device.type, dtype=dtype, enabled=dtype != torch.float32):
            loss = textbook_adversarial_step(model, images, labels, *numbers)
        updater.backward(loss, 1)
        updater.update()

    return step


def _updater(config: FinetuneConfig, model: torch.nn.Module, device: torch.device) -> Updater:
    o = config.optim
    optimizer = build_optimizer(
        model, LEARNING_RATE, o.weight_decay, o.layer_decay, find(config.model.model, pretraining=False)[0]
    )
    return Updater(optimizer, device, config.compute.precision == "fp16", max_norm=o.clip_grad)
