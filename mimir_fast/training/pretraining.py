"""From the configuration to the objects of a run."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from mimir_fast.attacks.pgd_mae import AttackFunctions, frozen_twin, linf_bounds
from mimir_fast.config.choices import PENALTIES
from mimir_fast.config.pretraining import PretrainConfig
from mimir_fast.data import BatchStream, build_pretrain_data
from mimir_fast.models import MaskedAutoencoderViT, create_model
from mimir_fast.objectives.reconstruction import Objective
from mimir_fast.training.compilation import Compiled
from mimir_fast.training.distributed import World, average_gradients
from mimir_fast.training.optimizer import Updater
from mimir_fast.training.precision import AUTOCAST, ComputeCopy
from mimir_fast.training.pretrain_step import Attack

FP16_ATTACK_SCALE = 65536.0


def build_data(config: PretrainConfig, world: World) -> BatchStream:
    """This rank's share of the training images; raises ValueError if an epoch holds no whole update."""
    d, o = config.data, config.optim
    stream = build_pretrain_data(
        d.dataset,
        d.data_root,
        config.model.input_size,
        o.batch_size,
        accum_iter=o.accum_iter,
        seed=config.run.seed,
        rank=world.rank,
        world_size=world.size,
        num_workers=d.num_workers,
        pin_memory=d.pin_mem and world.device.type == "cuda",
        use_edm=d.use_edm,
        unsup_fraction=d.unsup_fraction,
        aux_data_filename=d.aux_data_filename,
    )
    if len(stream) < o.accum_iter:
        raise ValueError(f"accum_iter: {o.accum_iter} exceeds the {len(stream)} micro-batches of an epoch")
    return stream


def build_model(config: PretrainConfig, device: torch.device) -> MaskedAutoencoderViT:
    """The model on its device, freshly initialised."""
    m = config.model
    size = {"img_size": m.input_size, "patch_size": m.patch_size}
    c = config.compute
    residual = torch.bfloat16 if c.residual_dtype == "bf16" else None
    options = {
        "norm_pix_loss": m.norm_pix_loss,
        "kernels": c.kernels,
        "residual_dtype": residual,
        "attention": c.attention,
        "mlp": c.mlp,
        "activation_checkpointing": c.activation_checkpointing,
    }
    return create_model(m.model, **size, **options).to(device)


def build_attack(config: PretrainConfig, stream: BatchStream, device: torch.device) -> Attack:
    """The attack in the images' units: flags in 1/255, divided by each channel's deviation for normalised images."""
    a = config.attack
    if a.attack == "plain":
        return Attack()
    bounds = a.eps / 255, a.alpha / 255, 0.0, 1.0
    if config.data.use_normalize:
        mean, std = torch.tensor(stream.mean), torch.tensor(stream.std)
        bounds = a.eps / 255 / std, a.alpha / 255 / std, (0.0 - mean) / std, (1.0 - mean) / std
    scale = FP16_ATTACK_SCALE if config.compute.precision == "fp16" else 1.0
    return Attack(a.steps, linf_bounds(*bounds, channels=3, device=device), a.attack_mask_ratio, scale)


def penalty_name(config: PretrainConfig) -> str | None:
    """hsic, dib_mi or renyi2; None without an attack or with any other word, as in the original."""
    chosen = config.penalty.mi_train
    return chosen if chosen in PENALTIES and config.attack.attack != "plain" else None


def peak_learning_rate(config: PretrainConfig, world: World) -> float:
    """--lr, or --blr per 256 images of an update."""
    o = config.optim
    return o.lr if o.lr is not None else o.blr * o.batch_size * o.accum_iter * world.size / 256


class Computation(NamedTuple):
    """What a step runs: the objective to train, the frozen model to attack and the attack's functions.

    states() returns the state dicts of the whole model and optimizer; every process calls it.
    """

    objective: nn.Module
    attacked: MaskedAutoencoderViT
    functions: AttackFunctions
    states: Callable[[], tuple[dict, dict]]


def build_computation(
    config: PretrainConfig,
    world: World,
    model: MaskedAutoencoderViT,
    updater: Updater,
    backend: str | Callable = "inductor",
) -> Computation:
    """16-bit copy or shards (told to the updater), frozen twin, compiled pieces, data parallelism: as configured.

    Unless it is sharded, `model` is up to date after every update.  backend: torch.compile's.
    """
    c = config.compute
    states = partial(_states, model, updater.optimizer)
    world.share(model.parameters())
    if c.precision != "fp32":
        if world.device.type == "cuda":
            torch.set_float32_matmul_precision("high")  # tf32 for what stays in fp32: the patch embedding
        if not sharded(config, world):
            updater.compute = ComputeCopy(model, AUTOCAST[c.precision])
            model = updater.compute.module
    attacked = frozen_twin(model)
    pieces = Compiled(model, attacked, c.compile, c.compile_mode, c.compile_region, backend)
    penalty = (penalty_name(config), config.penalty.mi_xpl)
    objective = Objective(model, config.model.mask_ratio, *penalty, pieces.encode, pieces.reconstruct)
    computation = Computation(objective, attacked, pieces.attack, states)
    if sharded(config, world):
        return _shard(config, world, computation, updater)
    return _replicate(config, world, computation, updater) if world.size > 1 else computation


def sharded(config: PretrainConfig, world: World) -> bool:
    """Whether each process keeps a share of the model."""
    return config.compute.parallel == "fsdp" and world.size > 1


def _states(model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[dict, dict]:
    return model.state_dict(), optimizer.state_dict()


def _replicate(config: PretrainConfig, world: World, computation: Computation, updater: Updater) -> Computation:
    c = config.compute
    devices = [world.device] if world.device.type == "cuda" else None
    static = (
        config.optim.accum_iter == 1 or updater.compute is not None
    )  # a static graph forbids holding gradients back
    options = {"gradient_as_bucket_view": True, "static_graph": static}
    objective = DistributedDataParallel(computation.objective, device_ids=devices, **options)
    objective.register_comm_hook(c.grad_compression == "bf16", average_gradients)
    return computation._replace(objective=objective)


def _shard(config: PretrainConfig, world: World, computation: Computation, updater: Updater) -> Computation:
    from mimir_fast.training.sharding import Reconstruction, Shards  # slow to import: only where there are shards

    c = config.compute
    loss = Reconstruction(computation.attacked)
    reduce_dtype = torch.bfloat16 if c.grad_compression == "bf16" else torch.float32
    shards = Shards(computation.objective, loss, updater, world, AUTOCAST[c.precision], reduce_dtype)
    functions = computation.functions._replace(loss=lambda _, *inputs: loss(*inputs))
    return computation._replace(functions=functions, states=shards.states)


def describe(
    config: PretrainConfig, world: World, stream: BatchStream, model: MaskedAutoencoderViT, lr: float
) -> list[str]:
    """Two lines that say what is about to run."""
    c = config.compute
    parameters = sum(p.numel() for p in model.parameters()) / 1e6
    attack = (
        "none" if config.attack.attack == "plain" else f"{config.attack.steps} step(s), eps {config.attack.eps:g}/255"
    )
    return [
        f"model {config.model.model} ({parameters:.2f} M parameters), {config.model.input_size}/{config.model.patch_size}; "
        f"data {stream.name}, {stream.num_images} images, {len(stream)} micro-batches per epoch; "
        f"attack {attack}; penalty {penalty_name(config) or 'none'}",
        f"device {world.device} x {world.size}, {f'{c.parallel}, ' if world.size > 1 else ''}{c.precision}, "
        f"compile {f'{c.compile_mode}, by {c.compile_region}' if c.compile else 'off'}, kernels {c.kernels}, "
        f"attention {c.attention}, mlp {c.mlp}, residual {c.residual_dtype}; "
        f"lr {lr:.3g}; outputs in {config.run.output_dir or '(nowhere)'}",
    ]
