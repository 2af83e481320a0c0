"""The step of each variant as a function without arguments: attack, forward, backward, optimizer update of one random batch.

ours         as the trainer builds it from its flags
references   the same, with every kernel's reference implementation, under plain torch.compile
textbook     bench/textbook.py, eager: all patches embedded and gathered afterwards, penalty by matrix inverses

A PretrainConfig gives the pre-training step, a FinetuneConfig the fine-tuning step (bench/step/finetuning.py).

The images are on the device already: reading, decoding and copying them is the data pipeline's.
"""

import argparse
from collections.abc import Callable

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from bench.rows import FINETUNE, PRETRAIN
from bench.step import finetuning
from bench.textbook import TextbookMAE, textbook_step
from mimir_fast.cli.parser import parse_args
from mimir_fast.cli.pretrain import PRETRAIN as COMMAND
from mimir_fast.config.finetuning import FinetuneConfig
from mimir_fast.config.pretraining import PretrainConfig
from mimir_fast.config.resolve import DTYPES, resolve
from mimir_fast.models.families import find
from mimir_fast.training.distributed import World
from mimir_fast.training.engine import Engine
from mimir_fast.training.finetuning import Finetuning
from mimir_fast.training.optimizer import Updater, build_optimizer
from mimir_fast.training.pretraining import Pretraining

VARIANTS = ("ours", "references", "textbook")
DEFAULTS = {PRETRAIN: ("mae_vit_base", 512), FINETUNE: ("vit_base", 256)}  # model, batch
LEARNING_RATE = 1e-4
StepConfig = PretrainConfig | FinetuneConfig


def fill_in(args: argparse.Namespace) -> None:
    """args.model and args.batch where they were not given: the task's."""
    model, batch = DEFAULTS[args.task]
    args.model, args.batch = args.model or model, batch if args.batch is None else args.batch


def configuration(variant: str, words: list[str], task: str = PRETRAIN) -> StepConfig:
    """The trainer's configuration from its own flags, on top of the ImageNet recipe (attack 1 step, hsic, norm_pix_loss)."""
    if variant == "references":
        words = [*words, "--kernels", "reference"]  # attention and MLP follow
    if task == FINETUNE:
        config = finetuning.settled(words)
    else:
        run = resolve(*parse_args(COMMAND, ["--recipe", "imagenet_vit_b", *words]))
        config = run.config.updated(run.flat())
    if variant == "textbook":
        config = config.updated({"compile": False})
    return config.check()


def build_step(variant: str, config: StepConfig, device: torch.device) -> Callable[[], None]:
    """The variant's step, ready to be called any number of times."""
    batch, side, finetuning_step = config.optim.batch_size, config.model.input_size, isinstance(config, FinetuneConfig)
    if variant != "textbook":
        classes = config.model.nb_classes if finetuning_step else 1
        images_u8 = torch.randint(256, (batch, 3, side, side), dtype=torch.uint8, device=device)
        return trainers(config, images_u8, torch.randint(classes, (batch,), device=device))
    if finetuning_step:
        return finetuning.textbook(config, *finetuning.random_batch(config, device))
    return textbook(config, torch.rand(batch, 3, side, side, device=device))


def trainers(config: StepConfig, images_u8: torch.Tensor, labels: torch.Tensor) -> Callable[[], None]:
    """The trainers' own step, of either configuration."""
    world = World(device=images_u8.device)
    task = Finetuning if isinstance(config, FinetuneConfig) else Pretraining
    engine = Engine(task(resolve(config, set()), world), world)

    def step() -> None:
        engine.micro_step(images_u8, labels)
        engine.update()

    return step


def textbook(config: PretrainConfig, images: torch.Tensor) -> Callable[[], None]:
    """Raises ValueError for an attack of more than one step."""
    m = config.model
    if config.attack.steps != 1:
        raise ValueError(f"steps: the textbook's pre-training step attacks once, got {config.attack.steps}")
    sizes = {**find(m.model, pretraining=True)[1], "img_size": m.input_size, "patch_size": m.patch_size}
    model = TextbookMAE(**sizes, norm_pix_loss=m.norm_pix_loss).to(images.device)
    updater = _updater(config, model, images.device)
    numbers = (config.attack.eps / 255, config.attack.alpha / 255, m.mask_ratio, config.penalty.mi_xpl)
    dtype = DTYPES[config.compute.precision]

    def step() -> None:
        with torch.autocast(images.device.type, dtype=dtype, enabled=dtype != torch.float32):
            loss = textbook_step(model, images, *numbers)
        updater.backward(loss, 1)
        updater.update()

    return step


def _updater(config: PretrainConfig, model: torch.nn.Module, device: torch.device) -> Updater:
    optimizer = build_optimizer(model, LEARNING_RATE, config.optim.weight_decay)
    return Updater(optimizer, device, config.compute.precision == "fp16")


class ConvolutionStandIn(TorchDispatchMode):
    """For a pretend GPU without cuDNN: convolutions return memory of the right shape; nothing is computed there anyway."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.convolution.default:
            images, weight, stride = args[0], args[1], args[3]
            sides = [1 + (side - kernel) // s for side, kernel, s in zip(images.shape[2:], weight.shape[2:], stride)]
            return images.new_empty(images.shape[0], weight.shape[0], *sides)
        if func is torch.ops.aten.convolution_backward.default:
            grad, images, weight, wanted = args[0], args[1], args[2], args[-1]
            likes = (images, weight, grad[0, :, 0, 0])
            return tuple(torch.empty_like(like) if want else None for like, want in zip(likes, wanted))
        return func(*args, **(kwargs or {}))
