"""From the configuration of a fine-tuning to the objects of its run."""

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from mimir_fast.attacks.pgd_mae import linf_bounds
from mimir_fast.checkpoints.reader import read
from mimir_fast.checkpoints.transfer import load_pretrained
from mimir_fast.config.finetuning import AttackConfig, FinetuneConfig
from mimir_fast.data import Augment, BatchStream, EvalStream, Mixing, build_train_data, eval_batches, warmup_mixing
from mimir_fast.models import VisionTransformer, create_classifier
from mimir_fast.objectives.adversarial_losses import cross_entropy
from mimir_fast.training.distributed import World
from mimir_fast.training.finetune_step import FP16_ATTACK_SCALE, Attack

HEAD_STD = {"imagenet": 2e-5}  # of a re-initialised head; elsewhere OTHER_HEAD_STD
OTHER_HEAD_STD = 2e-2


def build_data(config: FinetuneConfig, world: World) -> BatchStream:
    """This rank's share of the training images; raises ValueError if an epoch holds no whole update."""
    d, o, a = config.data, config.optim, config.augment
    stream = build_train_data(
        d.dataset,
        d.data_root,
        config.model.input_size,
        o.batch_size,
        augment=Augment(a.aa, a.color_jitter, a.reprob, a.remode, a.recount),
        num_classes=config.model.nb_classes,
        held_out=config.validation.held_out,
        accum_iter=o.accum_iter,
        seed=config.run.seed,
        rank=world.rank,
        world_size=world.size,
        num_workers=d.num_workers,
        pin_memory=d.pin_mem and world.device.type == "cuda",
        use_edm=d.use_edm,
        unsup_fraction=d.unsup_fraction,
        aux_data_filename=d.aux_data_filename,
        edm_aug=d.edm_aug,
        warmup_aa=warms_up(config),
    )
    if len(stream) < o.accum_iter:
        raise ValueError(f"accum_iter: {o.accum_iter} exceeds the {len(stream)} micro-batches of an epoch")
    return stream


def build_eval_data(config: FinetuneConfig, world: World, split: str) -> EvalStream:
    """This rank's share of the images of a split, val or held_out, for validation."""
    d = config.data
    return eval_batches(
        d.dataset,
        d.data_root,
        config.model.input_size,
        config.optim.batch_size,
        split=split,
        held_out=config.validation.held_out,
        num_classes=config.model.nb_classes,
        use_edm=d.use_edm,
        rank=world.rank,
        world_size=world.size,
        num_workers=d.num_workers,
        pin_memory=d.pin_mem and world.device.type == "cuda",
    )


def warms_up(config: FinetuneConfig) -> bool:
    """Whether augmentation and mixing grow: as in the original with an attack alone."""
    return config.augment.warmup_aa and config.attack.attack_train != "plain"


def build_mixing(config: FinetuneConfig, epoch: int) -> Mixing | None:
    """How an epoch's images are mixed; None where they are not, and targets are labels."""
    a = config.augment
    how = (a.mixup_prob, a.mixup_switch_prob, a.mixup_mode, a.smoothing, config.model.nb_classes)
    mixing = Mixing(a.mixup, a.cutmix, a.cutmix_minmax, *how)
    mixing = warmup_mixing(epoch, mixing) if warms_up(config) else mixing
    return mixing if mixing.active else None


def build_model(config: FinetuneConfig, stream: BatchStream, device: torch.device) -> VisionTransformer:
    """The classifier on its device, freshly initialised; images in [0,1] are normalised inside of it, if at all."""
    m, c = config.model, config.compute
    constants = {"mean": stream.mean, "std": stream.std} if config.data.use_normalize else {}
    model = create_classifier(
        m.model,
        img_size=m.input_size,
        patch_size=m.patch_size,
        num_classes=m.nb_classes,
        global_pool=m.global_pool,
        drop_path=m.drop_path,
        kernels=c.kernels,
        attention=c.attention,
        mlp=c.mlp,
        residual_dtype=torch.bfloat16 if c.residual_dtype == "bf16" else None,
        activation_checkpointing=c.activation_checkpointing,
        **constants,
    )
    return model.to(device)


def start_from_pretrained(model: VisionTransformer, config: FinetuneConfig, say: Callable[[str], None]) -> None:
    """Load --finetune; raises CheckpointError if it does not fit."""
    source = config.model.finetune
    if not source:
        say("finetune: no pre-trained checkpoint given, training from scratch")
        return
    head_std = HEAD_STD.get(config.data.dataset, OTHER_HEAD_STD)
    contents = read(source, "finetune")
    load_pretrained(model, contents.tensors, contents.source, say, head_std)
    before, now = contents.args.get("use_normalize"), config.data.use_normalize
    if before is not None and bool(before) != now:
        seen = "with" if before else "without"
        say(
            f"use_normalize: {source} was trained {seen} it, this run is {'with' if now else 'without'}; is that meant?"
        )


def build_attack(config: FinetuneConfig, epoch: int, device: torch.device) -> Attack:
    """The training attack of an epoch, in pixels of [0,1]."""
    a = config.attack
    eps, alpha = radius_and_step(a, epoch, config.optim.epochs)
    bounds = linf_bounds(eps / 255, alpha / 255, 0.0, 1.0, channels=3, device=device)
    scale = FP16_ATTACK_SCALE if config.compute.precision == "fp16" else 1.0
    return Attack(a.attack_train, a.steps, bounds, scale, a.trades_beta)


def build_criterion(config: FinetuneConfig) -> Callable[[Tensor, Tensor], Tensor]:
    """(logits, targets) -> the loss of plain, pgd and apgd: cross-entropy, labels smoothed, mixed ones as they are."""
    return partial(cross_entropy, smoothing=config.augment.smoothing)


def information_weights(config: FinetuneConfig) -> tuple[float, float] | None:
    """--mi_xz and --mi_yz, None without --mi_loss dib_mi."""
    p = config.penalty
    return (p.mi_xz, p.mi_yz) if p.mi_loss == "dib_mi" else None


def radius_and_step(a: AttackConfig, epoch: int, epochs: int) -> tuple[float, float]:
    """eps and alpha in 1/255 in an epoch of a run of `epochs`: each has a warm-up, alpha may then go to alpha_end."""
    eps = a.eps * _grown(epoch, a.eps_warmup_epochs)
    if epoch < a.alpha_warmup_epochs or a.alpha_schedule == "constant":
        return eps, a.alpha * _grown(epoch, a.alpha_warmup_epochs)
    progress = (epoch - a.alpha_warmup_epochs) / max(epochs - 1 - a.alpha_warmup_epochs, 1)
    left = 1 - progress if a.alpha_schedule == "linear" else (1 + math.cos(math.pi * progress)) / 2
    return eps, a.alpha_end + (a.alpha - a.alpha_end) * left


def _grown(epoch: int, warmup_epochs: int) -> float:
    return min(epoch / warmup_epochs, 1.0) if warmup_epochs else 1.0


def describe(
    config: FinetuneConfig, world: World, stream: BatchStream, model: VisionTransformer, lr: float
) -> list[str]:
    """Lines that say what is about to run."""
    c, m, o, a, v = config.compute, config.model, config.optim, config.attack, config.validation
    parameters = sum(p.numel() for p in model.parameters()) / 1e6
    attack = "none" if a.attack_train == "plain" else f"{a.attack_train}, {a.steps} step(s), eps {a.eps:g}/255"
    average = f", average {o.model_ema_decay:g}" if o.model_ema else ""
    return [
        f"model {m.model} ({parameters:.2f} M parameters), {m.input_size}/{m.patch_size}, {m.nb_classes} classes; "
        f"data {stream.name}, {stream.num_images} images, {len(stream)} micro-batches per epoch, {v.held_out} held out; "
        f"attack {attack}; validation attack {v.val_attack}",
        f"device {world.device} x {world.size}, {c.precision}, "
        f"compile {f'{c.compile_mode}, by {c.compile_region}' if c.compile else 'off'}, kernels {c.kernels}, "
        f"attention {c.attention}, mlp {c.mlp}, residual {c.residual_dtype}; lr {lr:.3g}, layer decay {o.layer_decay:g}"
        f"{average}; outputs in {config.run.output_dir or '(nowhere)'}",
    ]
