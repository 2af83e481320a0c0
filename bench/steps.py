"""The step of each variant as a function without arguments: attack, forward, backward, optimizer update of one random batch.

ours         as the trainer builds it from its flags
references   the same, with every kernel's reference implementation, under plain torch.compile
textbook     tests/oracles/textbook.py, eager: the step written straightforwardly; its fine-tuning model is timm's own

The images are on the device already, as floats: reading, decoding and copying them is the data pipeline's.
"""

import argparse
import importlib
from collections.abc import Callable
from itertools import chain

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
from mimir_fast.config.resolve import DTYPES, Run, resolve
from mimir_fast.models.families import find
from mimir_fast.training import layer_decay, optimizer
from mimir_fast.training.distributed import World
from mimir_fast.training.engine import Engine
from mimir_fast.training.optimizer import Updater
from mimir_fast.training.train import build_task

VARIANTS = ("ours", "references", "textbook")
PRETRAIN, FINETUNE = "pretrain", "finetune"
DEFAULTS = {PRETRAIN: ("mae_vit_base", 512), FINETUNE: ("vit_base", 256)}  # model, batch
RECIPES = {PRETRAIN: "imagenet_vit_b", FINETUNE: "imagenet_vit_s"}  # attack of 1 step, hsic; PGD, 1 step at eps 4
LEARNING_RATE = 1e-4
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
    """The flags that say whose step it is, and how large."""
    add = parser.add_argument
    add("--task", choices=list(DEFAULTS), default=PRETRAIN, help="whose step (default: %(default)s)")
    add("--model", help="model name (default: mae_vit_base; fine-tuning: vit_base)")
    add("--batch", type=int, help="images per micro-batch (default: 512; fine-tuning: 256)")
    add("--input_size", type=int, default=224, help="image side [pixels] (default: %(default)s)")
    add("--patch_size", type=int, default=16, help="patch side [pixels] (default: %(default)s)")
    add("--gpu", choices=list(PEAKS), help="whose peaks (default: those of the GPU found)")


def check(args: argparse.Namespace, *numbers: str) -> None:
    """Fill in the task's model and batch; raises ValueError naming the number that is too small."""
    model, batch = DEFAULTS[args.task]
    args.model, args.batch = args.model or model, batch if args.batch is None else args.batch
    for name in ("batch", *numbers):
        if getattr(args, name) < 1:
            raise ValueError(f"{name}: expected 1 or more, got {getattr(args, name)}")


def flags_of(args: argparse.Namespace) -> list[str]:
    """The same in the trainer's words."""
    sizes = {"batch_size": args.batch} | {name: getattr(args, name) for name in ("model", "input_size", "patch_size")}
    return [word for name, value in sizes.items() for word in (f"--{name}", str(value))]


def asked(task: str, words: list[str]) -> Run:
    """The run that the trainer would begin with these flags of its own, on top of an ImageNet recipe."""
    words = ["--recipe", RECIPES[task], *words]
    if task == FINETUNE:
        return resolve(*parse_args(FINETUNE_COMMAND, words))
    return resolve(*parse_args(PRETRAIN_COMMAND, words))


def configuration(task: str, words: list[str], variant: str = "ours") -> StepConfig:
    """The configuration of a variant's step."""
    if variant == "references":
        words = [*words, "--kernels", "reference"]  # attention and MLP follow
    run = asked(task, words)
    config = run.config.updated(run.flat())
    return (config.updated({"compile": False}) if variant == "textbook" else config).check()


# ---- the steps


def build_step(variant: str, config: StepConfig, device: torch.device) -> Callable[[], object]:
    """The variant's step, ready to be called any number of times.

    Raises ValueError for a textbook pre-training step with an attack of more than one step.
    """
    flat = config.flat()
    shape = (flat["batch_size"], 3, flat["input_size"], flat["input_size"])
    images_u8 = torch.randint(256, shape, dtype=torch.uint8, device=device)
    labels = torch.randint(flat.get("nb_classes", 1), shape[:1], device=device)
    return (textbook if variant == "textbook" else product)(config, images_u8, labels)


def product(config: StepConfig, images_u8: Tensor, labels: Tensor) -> Callable[[], object]:
    """The trainer's own: noise, attack, forward, backward and update of a batch that is prepared once."""
    world = World(device=images_u8.device)
    engine = Engine(build_task(resolve(config, set()), world), world)
    batch = engine.task.prepare(images_u8, labels, 0, 0)
    # what the step returned is alive during the update, as in the loop
    return lambda: (engine.forward_backward(batch, engine.task.draw_noise(engine.generator, batch)), engine.update())


def textbook(config: StepConfig, images_u8: Tensor, labels: Tensor) -> Callable[[], object]:
    """The rival's.  bench runs from a checkout, where the tests' oracles are at hand."""
    images, device = images_u8 / 255, images_u8.device
    batch: tuple[Tensor, ...]
    oracle, flat = importlib.import_module("tests.oracles.textbook"), config.flat()
    sizes = {"img_size": flat["input_size"], "patch_size": flat["patch_size"]}
    eps, alpha = flat["eps"] / 255, flat["alpha"] / 255
    if isinstance(config, FinetuneConfig):
        sizes |= find(flat["model"], pretraining=False)[1]
        model = oracle.textbook_classifier(num_classes=flat["nb_classes"], drop_path=flat["drop_path"], **sizes)
        numbers = (eps, alpha, flat["steps"], flat["smoothing"])
        step, batch = oracle.textbook_adversarial_step, (images, labels)
    else:
        if flat["steps"] != 1:
            raise ValueError(f"steps: the textbook's pre-training step attacks once, got {flat['steps']}")
        sizes |= find(flat["model"], pretraining=True)[1]
        model = oracle.TextbookMAE(**sizes, norm_pix_loss=flat["norm_pix_loss"])
        numbers = (eps, alpha, flat["mask_ratio"], flat["mi_xpl"])
        step, batch = oracle.textbook_step, (images,)
    model, dtype = model.to(device), DTYPES[flat["precision"]]
    updater = Updater(optimizer_of(config, model), device, flat["precision"] == "fp16", max_norm=flat.get("clip_grad"))

    def run() -> None:
        with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
            loss = step(model, *batch, *numbers)
        updater.backward(loss, 1)
        updater.update()

    return run


def optimizer_of(config: StepConfig, model: torch.nn.Module) -> torch.optim.Optimizer:
    """The trainer's, for another model."""
    decay = config.optim.weight_decay
    if isinstance(config, FinetuneConfig):
        family = find(config.model.model, pretraining=False)[0]
        return layer_decay.build_optimizer(model, LEARNING_RATE, decay, config.optim.layer_decay, family)
    return optimizer.build_optimizer(model, LEARNING_RATE, decay)


def model_flops(config: StepConfig) -> float:
    """FLOPs of the matrix products and attention of one image: attack, forward and backward pass; a multiply-add is two.

    Counted on a step of one image on the CPU, whatever the configuration computes with.  Not counted: the penalty, elementwise
    work, what activation checkpointing computes twice.
    """
    plain = {name: value for name, value in PLAIN.items() if name in config.flags()}
    step = build_step("ours", config.updated(plain), torch.device("cpu"))
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
