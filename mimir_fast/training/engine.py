"""What a fine-tuning step runs: compiled pieces, 16-bit copy, frozen twin, data parallelism."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from mimir_fast.attacks.pgd_mae import frozen_twin
from mimir_fast.config.pretraining import ComputeConfig
from mimir_fast.kernels._shared.registration import choose
from mimir_fast.models import VisionTransformer
from mimir_fast.objectives.adversarial_losses import cross_entropy
from mimir_fast.objectives.classification import Objective
from mimir_fast.training.compilation import compile_blocks
from mimir_fast.training.distributed import World, average_gradients
from mimir_fast.training.finetune_step import Attack, AttackFunctions
from mimir_fast.training.optimizer import Updater
from mimir_fast.training.precision import AUTOCAST, ComputeCopy


class Computation(NamedTuple):
    """The objective to train, the frozen model to attack and the attack's functions: finetune_step's arguments.

    states() returns the state dicts of the model and of the optimizer; every process calls it.
    """

    objective: nn.Module
    attacked: VisionTransformer
    functions: AttackFunctions
    states: Callable[[], tuple[dict, dict]]


def build_computation(
    compute: ComputeConfig,
    world: World,
    model: VisionTransformer,
    updater: Updater,
    attack: Attack,
    criterion: Callable[[Tensor, Tensor], Tensor] = cross_entropy,
    backend: str | Callable = "inductor",
    information: tuple[float, float] | None = None,
    accum_iter: int = 1,
) -> Computation:
    """16-bit copy (told to the updater), frozen twin, compiled pieces, data parallelism: as configured.

    attack: its kind and beta are fixed here, its bounds may change from step to step.  criterion, information: see Objective.
    `model` is up to date after every update.  backend: torch.compile's.
    """
    states = partial(_states, model, updater.optimizer)
    world.share(model.parameters())
    if compute.precision != "fp32":
        if world.device.type == "cuda":
            torch.set_float32_matmul_precision("high")  # tf32 for what stays in fp32: the patch embedding
        updater.compute = ComputeCopy(model, AUTOCAST[compute.precision])
        model = updater.compute.module
    attacked = frozen_twin(model).eval()
    features, functions = model.forward_features, AttackFunctions()
    if compute.compile:
        features, functions = compiled_pieces(model, attacked, compute.compile_mode, compute.compile_region, backend)
    objective = Objective(model, attack.kind, criterion, attack.beta, information, features)
    if world.size > 1:
        objective = _replicate(objective, world, compute, accum_iter == 1 or updater.compute is not None)
    return Computation(objective, attacked, functions, states)


def compiled_pieces(
    model: VisionTransformer,
    attacked: VisionTransformer,
    mode: str = "default",
    region: str = "model",
    backend: str | Callable = "inductor",
) -> tuple[Callable[..., Tensor], AttackFunctions]:
    """The model's forward_features for training, and the attack's functions; fullgraph, static shapes.

    attacked     must have nothing to train: a compiled function computes every gradient that it could be asked for
    region       "block": one graph for the first block, which has nothing to add, one for all others; quick to compile
    Bounds are arguments on the device: new ones compile nothing.
    """
    options = {"fullgraph": True, "dynamic": False, "mode": mode, "backend": backend}
    features, functions = model.forward_features, AttackFunctions()
    if region == "block":
        compile_blocks([*model.blocks, *attacked.blocks], **options)
    else:
        features = torch.compile(features, **options)
        functions = functions._replace(
            losses=torch.compile(functions.losses, **options), logits=torch.compile(functions.logits, **options)
        )
    # without CUDA graphs, whose outputs do not outlive their next run: these hand images on from one to the other
    options["mode"] = "default"
    step, move = (torch.compile(f, **options) for f in (functions.step, functions.move))
    begin = functions.begin
    if choose(model.kernels, model.cls_token) == "reference":  # elsewhere it is one kernel already
        begin = torch.compile(begin, **options)
    return features, functions._replace(step=step, move=move, begin=partial(begin, kernels=model.kernels))


def compile_rated(model: VisionTransformer, compute: ComputeConfig) -> None:
    """Compile a model that only validation sees where `compiled_pieces` cannot: blocks belong to their model."""
    if compute.compile and compute.compile_region == "block":
        compile_blocks(model.blocks, fullgraph=True, dynamic=False, mode=compute.compile_mode)


def _states(model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[dict, dict]:
    return model.state_dict(), optimizer.state_dict()


def _replicate(objective: nn.Module, world: World, compute: ComputeConfig, static: bool) -> DistributedDataParallel:
    """Data parallelism as in pre-training; static: gradients are never held back from averaging."""
    devices = [world.device] if world.device.type == "cuda" else None
    options = {"gradient_as_bucket_view": True, "static_graph": static}
    replicated = DistributedDataParallel(objective, device_ids=devices, **options)
    replicated.register_comm_hook(compute.grad_compression == "bf16", average_gradients)
    return replicated
