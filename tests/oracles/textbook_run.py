"""The rival's step from the trainer's configuration, with the trainer's optimizer: what benchmarks run beside ours."""

from collections.abc import Callable

import torch
from torch import Tensor

from mimir_fast.config.finetuning import FinetuneConfig
from mimir_fast.config.pretraining import PretrainConfig
from mimir_fast.config.resolve import DTYPES
from mimir_fast.models.families import find
from mimir_fast.training import layer_decay, optimizer
from mimir_fast.training.optimizer import Updater
from tests.oracles.textbook import TextbookMAE, textbook_adversarial_step, textbook_classifier, textbook_step

LEARNING_RATE = 1e-4
Config = PretrainConfig | FinetuneConfig


def textbook_run(config: Config, images_u8: Tensor, labels: Tensor) -> Callable[[], object]:
    """Attack, forward, backward and update of one batch, uint8 [B,3,H,W] with labels [B], as a function without arguments.

    Raises ValueError for pre-training with an attack of more than one step.
    """
    images, device = images_u8 / 255, images_u8.device
    flat = config.flat()
    sizes = {"img_size": flat["input_size"], "patch_size": flat["patch_size"]}
    eps, alpha = flat["eps"] / 255, flat["alpha"] / 255
    if isinstance(config, FinetuneConfig):
        sizes |= find(flat["model"], pretraining=False)[1]
        model = textbook_classifier(num_classes=flat["nb_classes"], drop_path=flat["drop_path"], **sizes)
        numbers = (eps, alpha, flat["steps"], flat["smoothing"])
        step, batch = textbook_adversarial_step, (images, labels)
    else:
        if flat["steps"] != 1:
            raise ValueError(f"steps: the textbook's pre-training step attacks once, got {flat['steps']}")
        sizes |= find(flat["model"], pretraining=True)[1]
        model = TextbookMAE(**sizes, norm_pix_loss=flat["norm_pix_loss"])
        numbers = (eps, alpha, flat["mask_ratio"], flat["mi_xpl"])
        step, batch = textbook_step, (images,)
    model, dtype = model.to(device), DTYPES[flat["precision"]]
    updater = Updater(optimizer_of(config, model), device, flat["precision"] == "fp16", max_norm=flat.get("clip_grad"))

    def run() -> None:
        with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
            loss = step(model, *batch, *numbers)
        updater.backward(loss, 1)
        updater.update()

    return run


def optimizer_of(config: Config, model: torch.nn.Module) -> torch.optim.Optimizer:
    """The trainer's, for another model."""
    decay = config.optim.weight_decay
    if isinstance(config, FinetuneConfig):
        family = find(config.model.model, pretraining=False)[0]
        return layer_decay.build_optimizer(model, LEARNING_RATE, decay, config.optim.layer_decay, family)
    return optimizer.build_optimizer(model, LEARNING_RATE, decay)
