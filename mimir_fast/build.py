"""From the configuration to the objects of a run."""

from collections.abc import Callable

import torch
from torch.nn.parallel import DistributedDataParallel

from mimir_fast.attack import linf_bounds, reconstruction
from mimir_fast.config import PretrainConfig
from mimir_fast.data import BatchStream, build_pretrain_data
from mimir_fast.distributed import World
from mimir_fast.mi import PENALTIES
from mimir_fast.models import MaskedAutoencoderViT, create_model
from mimir_fast.objective import Objective
from mimir_fast.step import Attack

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
    options = {"kernels": config.optim.kernels, "activation_checkpointing": config.optim.activation_checkpointing}
    return create_model(m.model, **size, norm_pix_loss=m.norm_pix_loss, **options).to(device)


def build_attack(config: PretrainConfig, stream: BatchStream, device: torch.device) -> Attack:
    """The attack in the images' units: flags in 1/255, divided by each channel's deviation for normalised images."""
    a = config.attack
    if a.attack == "plain":
        return Attack()
    bounds = a.eps / 255, a.alpha / 255, 0.0, 1.0
    if config.data.use_normalize:
        mean, std = torch.tensor(stream.mean), torch.tensor(stream.std)
        bounds = a.eps / 255 / std, a.alpha / 255 / std, (0.0 - mean) / std, (1.0 - mean) / std
    scale = FP16_ATTACK_SCALE if config.optim.precision == "fp16" else 1.0
    return Attack(a.steps, linf_bounds(*bounds, channels=3, device=device), a.attack_mask_ratio, scale)


def penalty_name(config: PretrainConfig) -> str | None:
    """hsic, dib_mi or renyi2; None without an attack or with any other word, as in the original."""
    chosen = config.penalty.mi_train
    return chosen if chosen in PENALTIES and config.attack.attack != "plain" else None


def peak_learning_rate(config: PretrainConfig, world: World) -> float:
    """--lr, or --blr per 256 images of an update."""
    o = config.optim
    return o.lr if o.lr is not None else o.blr * o.batch_size * o.accum_iter * world.size / 256


def build_objective(
    config: PretrainConfig, world: World, model: MaskedAutoencoderViT, backend: str | Callable = "inductor"
):
    """What is trained (compiled and data-parallel as configured), and the attack's loss function (compiled or not)."""
    pieces, attack_loss = {}, reconstruction
    if config.optim.compile:
        pieces = {
            name: torch.compile(getattr(model, name), fullgraph=True, backend=backend)
            for name in ("encode", "reconstruct")
        }
        attack_loss = torch.compile(reconstruction, fullgraph=True, backend=backend)
    objective = Objective(model, config.model.mask_ratio, penalty_name(config), config.penalty.mi_xpl, **pieces)
    if world.size > 1:
        devices = [world.device] if world.device.type == "cuda" else None
        objective = DistributedDataParallel(objective, device_ids=devices, gradient_as_bucket_view=True)
    return objective, attack_loss


def describe(
    config: PretrainConfig, world: World, stream: BatchStream, model: MaskedAutoencoderViT, lr: float
) -> list[str]:
    """Two lines that say what is about to run."""
    parameters = sum(p.numel() for p in model.parameters()) / 1e6
    attack = (
        "none" if config.attack.attack == "plain" else f"{config.attack.steps} step(s), eps {config.attack.eps:g}/255"
    )
    return [
        f"model {config.model.model} ({parameters:.2f} M parameters), {config.model.input_size}/{config.model.patch_size}; "
        f"data {stream.name}, {stream.num_images} images, {len(stream)} micro-batches per epoch; "
        f"attack {attack}; penalty {penalty_name(config) or 'none'}",
        f"device {world.device} x {world.size}, {config.optim.precision}, compile {'on' if config.optim.compile else 'off'}, "
        f"kernels {config.optim.kernels}; lr {lr:.3g}; outputs in {config.run.output_dir or '(nowhere)'}",
    ]
