"""The step of each variant as functions without arguments: attack, forward, backward, optimizer update of one random batch.

ours         as the trainer builds it from its flags
references   the same, with every kernel's reference implementation, under plain torch.compile, uncaptured
textbook     tests/oracles/textbook.py, eager: the step written straightforwardly; its fine-tuning model is timm's own

The images are on the device already, as the step takes them: reading, decoding and copying them is the data pipeline's.
"""

import argparse
import importlib
import itertools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from bench.peaks import PEAKS
from bench.simulated_gpu import marker
from bench.step.launches import PRODUCT
from bench.step.trace import record
from mimir_fast.cli.finetune import FINETUNE as FINETUNE_COMMAND
from mimir_fast.cli.parser import parse_args
from mimir_fast.cli.pretrain import PRETRAIN as PRETRAIN_COMMAND
from mimir_fast.config.finetuning import FinetuneConfig
from mimir_fast.config.pretraining import PretrainConfig
from mimir_fast.config.resolve import Run, resolve
from mimir_fast.models.families import find
from mimir_fast.models.families.vit import VIT
from mimir_fast.training.distributed import World
from mimir_fast.training.engine import Engine
from mimir_fast.training.options import patch_size
from mimir_fast.training.train import build_task
from mimir_fast.tuning.decisions import decide

VARIANTS = ("ours", "references", "textbook")
PRETRAIN, FINETUNE = "pretrain", "finetune"
DEFAULTS = {  # attack of 1 step, hsic; PGD, 1 step at eps 4
    PRETRAIN: "--recipe imagenet_vit_b --model mae_vit_base --batch_size 512".split(),
    FINETUNE: "--recipe imagenet_vit_s --model vit_base --batch_size 256".split(),
}
StepConfig = PretrainConfig | FinetuneConfig
# computes like no other setting, but every product is one that the recorder sees
PLAIN = {
    **{"device": "cpu", "batch_size": 1, "accum_iter": 1, "precision": "fp32", "residual_dtype": "fp32"},
    **{"compile": False, "compile_region": "model", "parallel": "ddp", "activation_checkpointing": False},
    **{"kernels": "reference", "mlp": "reference", "attention": "math", "use_normalize": False, "mi_train": "plain"},
    "mi_loss": "plain",
}


# ---- the trainer's configuration


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Whose step it is; how large it is, the trainer's own flags say."""
    add = parser.add_argument
    add("--task", choices=list(DEFAULTS), default=PRETRAIN, help="whose step (default: %(default)s)")
    add("--gpu", choices=list(PEAKS), help="whose peaks (default: those of the GPU found)")


def asked(task: str, words: list[str]) -> Run:
    """The run that the trainer would begin with these flags of its own, on top of an ImageNet recipe."""
    words = [*DEFAULTS[task], *["--tune", "off"] * bool(marker()), *words]  # nothing takes time on a simulated GPU
    if task == FINETUNE:
        return resolve(*parse_args(FINETUNE_COMMAND, words))
    return resolve(*parse_args(PRETRAIN_COMMAND, words))


def configuration(task: str, words: list[str], variant: str = "ours") -> StepConfig:
    """The configuration of a variant's step."""
    if variant == "references":
        words = [*words, "--kernels", "reference", "--step_graph", "off"]  # attention and MLP follow
    config = as_run(asked(task, words))
    return (config.updated({"compile": False}) if variant == "textbook" else config).check()


def as_run(run: Run) -> StepConfig:
    """A run's configuration with what was resolved in it, and the side of a patch where the model's name decides it."""
    return run.config.updated(run.flat() | {"patch_size": patch_size(run)})


# ---- the steps


def variants(model: str) -> tuple[str, ...]:
    """Those that there are of a model: the textbook writes no family but ViT."""
    return VARIANTS if find(model, None)[0] is VIT else VARIANTS[:2]


class Update(NamedTuple):
    """A step, twice; both are functions without arguments, to be called any number of times in the context.

    uncaptured   what the device does, launch by launch
    run          the same as the training runs it, which is what the host issues
    """

    uncaptured: Callable[[], object]
    run: Callable[[], object]
    context: AbstractContextManager


def build_step(variant: str, config: StepConfig, device: torch.device) -> Update:
    """The variant's step.

    Raises ValueError for a textbook pre-training step with an attack of more than one step, or of another family than ViT.
    """
    flat = config.flat()
    if variant not in variants(flat["model"]):
        raise ValueError(f"variant: the textbook has ViTs only, got {flat['model']}")
    shape = (flat["batch_size"], 3, flat["input_size"], flat["input_size"])
    images_u8 = torch.randint(256, shape, dtype=torch.uint8, device=device)
    labels = torch.randint(flat.get("nb_classes", 1), shape[:1], device=device)
    if variant != "textbook":
        return product(config, images_u8, labels)
    # imported here, untyped: bench runs from a checkout, where the tests' oracles are at hand
    step = importlib.import_module("tests.oracles.textbook_run").textbook_run(config, images_u8, labels)
    return Update(step, step, nullcontext())


def product(config: StepConfig, images_u8: Tensor, labels: Tensor) -> Update:
    """The trainer's own.  Uncaptured: noise, attack, forward, backward and update of a batch that is prepared once."""
    world = World(device=images_u8.device)
    engine = tuned_engine(resolve(config, set()), world)
    batch, _ = engine.prepare(images_u8, labels, 0, 0)

    def uncaptured() -> object:
        # what the step returned is alive during the update, as in the loop
        return engine.forward_backward(batch, engine.task.draw_noise(engine.generator, batch)), engine.update()

    number = itertools.count(1)

    def run() -> object:
        n = next(number)
        make_room(engine, n)
        return engine.advance(images_u8, labels, 0, n - 1, n)

    return Update(uncaptured, run, engine.captured.context())


def tuned_engine(run: Run, world: World) -> Engine:
    """The engine of a run, with the implementations that the training loop would choose."""
    task = build_task(run, world)
    decide(task, world, {}, print)
    print(f"tune: {task.run.compute.tune}")
    return Engine(task, world)


def make_room(engine: Engine, number: int) -> None:
    """At update `number`: let the rows of the table of metrics go before it is full, where no loop reads them."""
    if number % engine.meters.rows.capacity == 0:
        engine.meters.rows.next.zero_()


def model_flops(config: StepConfig) -> float:
    """FLOPs of the matrix products and attention of one image: attack, forward and backward pass; a multiply-add is two.

    Counted on a step of one image on the CPU, whatever the configuration computes with.  Not counted: the penalty, elementwise
    work, what activation checkpointing computes twice.
    """
    plain = {name: value for name, value in PLAIN.items() if name in config.flags()}
    step = build_step("ours", config.updated(plain), torch.device("cpu")).uncaptured
    # torch's FlopCounterMode cannot look into the attack: its module tracker fails under torch.autograd.grad (torch 2.14)
    return sum(sum(p.flops.values()) for p in chain(*record(step, "cpu")))


# ---- without cuDNN


def leave_cudnn_out() -> None:
    """On a simulated GPU, which has none: attention chooses among torch's other kernels."""
    if marker():
        torch.backends.cuda.enable_cudnn_sdp(False)


class ConvolutionStandIn(TorchDispatchMode):
    """For a simulated GPU: convolutions return memory of the right shape, and leave a mark for each product that they are."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        mark = marker() or (lambda text: None)
        if func is torch.ops.aten.convolution.default:
            images, weight, stride = args[0], args[1], args[3]
            sides = [1 + (side - kernel) // s for side, kernel, s in zip(images.shape[2:], weight.shape[2:], stride)]
            mark(PRODUCT)
            return images.new_empty(images.shape[0], weight.shape[0], *sides)
        if func is torch.ops.aten.convolution_backward.default:
            grad, images, weight, wanted = args[0], args[1], args[2], args[-1]
            likes = (images, weight, grad[0, :, 0, 0])
            for _ in range(sum(wanted[:2])):
                mark(PRODUCT)
            return tuple(torch.empty_like(like) if want else None for like, want in zip(likes, wanted))
        return func(*args, **(kwargs or {}))
