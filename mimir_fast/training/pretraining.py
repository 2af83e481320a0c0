"""Pre-training task: the reconstruction, its attack and penalty, and what is logged."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from mimir_fast.attacks.linf import attack_bounds
from mimir_fast.attacks.pgd_mae import MaeAttackFunctions, by_patches, plain_functions
from mimir_fast.checkpoints.run_state import Position
from mimir_fast.config.choices import PENALTIES
from mimir_fast.config.pretraining import PretrainConfig
from mimir_fast.config.resolve import Run
from mimir_fast.data import BatchStream, build_pretrain_data, dataset_info
from mimir_fast.data.crops import Channels, model_input
from mimir_fast.data.datasets import DatasetInfo
from mimir_fast.kernels import linf_patch_step
from mimir_fast.models import MaskedAutoencoder, create_model
from mimir_fast.objectives.reconstruction import PretrainOutput, ReconstructionObjective
from mimir_fast.report.samples import SAMPLES, save_samples
from mimir_fast.training.compilation import Compiler
from mimir_fast.training.distributed import World
from mimir_fast.training.host_masks import HostMasks
from mimir_fast.training.optimizer import Updater, build_optimizer
from mimir_fast.training.options import check_resumed, model_options, on_device, stream_options
from mimir_fast.training.pretrain_step import MaeAttack, MaeNoise, draw_noise, pretrain_step, start_seed
from mimir_fast.training.seeds import step_seed
from mimir_fast.training.task import Measured

# Epochs, as in the original.
CHECKPOINT_EVERY = 20
# Images, and the host's masks of a model that has them.
Batch = Tensor | tuple[Tensor, Tensor]
# Loss scale of the attack in fp16, whose loss is a mean over all pixels.
FP16_ATTACK_SCALE = 65536.0


class Pretraining:
    """Adversarial masked-autoencoder pre-training: a Task (see task.py); raises ValueError for what cannot be built.

    stream   this process's images; None: a step needs none, and normalises as the data set's name says
    """

    average_decay, form = None, None

    def __init__(self, run: Run[PretrainConfig], world: World, stream: BatchStream | None = None):
        self.run, self.world, self.stream = run, world, stream
        self.config = config = run.config
        images = stream or dataset_info(config.data.dataset)
        self.mean: Channels | None = images.mean if config.data.use_normalize else None
        self.std: Channels | None = images.std if config.data.use_normalize else None
        self.model = build_model(run, world.device)
        # Where our kernels read images as bytes, no floats are written: they take four times the memory and its traffic.
        in_bytes = self.mean is None and self.model.kernels == "triton" and by_patches(self.model)
        self.pixels = torch.uint8 if in_bytes else torch.float32
        self.attack = build_attack(run, images, world.device)
        ratios = [self.attack.mask_ratio] * (self.attack.steps or 0) + [config.model.mask_ratio]
        self.host_masks = HostMasks(self.model, ratios) if self.model.masks_on_host else None
        self.penalty = penalty_name(config)
        self.gathers = self.penalty is not None and config.penalty.penalty_batch == "global" and world.size > 1
        # Between two graphs a gather would run once more in a process whose capture failed than in the others.
        self.uncapturable = "--penalty_batch global gathers over processes" if self.gathers else ""
        self.summary = summary(config, world.size)
        self.tags = {"train_loss": "loss", "lr": "lr"} | ({"mi": "mi"} if self.penalty else {})
        self.skipped_penalties = torch.zeros((), dtype=torch.float64, device=world.device)

    # ---- the step

    def updater(self, lr: float) -> Updater:
        optimizer = build_optimizer(self.model, lr, self.config.optim.weight_decay)
        return Updater(optimizer, self.world.device, self.run.compute.scaled)

    def attack_functions(self, compiler: Compiler) -> MaeAttackFunctions:
        plain = plain_functions(self.model)
        # linf_patch_step is an operation of ours, a kernel on a GPU; linf_step is plain PyTorch.
        step = compiler.operation if plain.step is linf_patch_step else compiler.pixels
        return MaeAttackFunctions(compiler.attacked(plain.loss), compiler.operation(plain.start), step(plain.step))

    def objective(self, model: MaskedAutoencoder, compiler: Compiler) -> ReconstructionObjective:
        c = self.config
        pieces = compiler.trained(model.encode), compiler.trained(model.reconstruct)
        gathered = self.world if self.gathers else None
        return ReconstructionObjective(model, c.model.mask_ratio, self.penalty, c.penalty.mi_xpl, *pieces, gathered)

    def host_draws(self, images: Tensor, epoch: int, step: int) -> Tensor | None:
        if self.host_masks is None:
            return None
        return self.host_masks.draw(step_seed(self.config.run.seed, self.world.rank, epoch, step))

    def prepare(self, images: Tensor, labels: Tensor, draws: Tensor | None) -> Batch:
        if images.dtype != self.pixels:
            images = model_input(images, self.mean, self.std)
        return images if draws is None else (images, draws)

    def draw_noise(self, generator: torch.Generator, batch: Batch) -> MaeNoise:
        if isinstance(batch, Tensor):
            return draw_noise(generator, *self.model.noise_shape(len(batch)), self.attack)
        assert self.host_masks is not None
        masks, plans = self.host_masks.unpack(batch[1])
        return MaeNoise(start_seed(generator), masks[:-1], masks[-1], tuple(plans))

    def step(
        self,
        objective: nn.Module,
        attacked: MaskedAutoencoder,
        functions: MaeAttackFunctions,
        batch: Batch,
        noise: MaeNoise,
    ) -> PretrainOutput:
        images = batch if isinstance(batch, Tensor) else batch[0]
        output = pretrain_step(objective, attacked, images, noise, self.attack, functions)
        self.skipped_penalties += ~output.penalty_used
        return output

    # ---- epochs

    def start_epoch(self, epoch: int) -> None:
        """Nothing depends on the epoch."""

    def end_epoch(self, engine, epoch: int, ends: Callable[[], bool]) -> Measured:
        """Nothing is validated."""
        return Measured({})

    def keeps(self, epoch: int) -> bool:
        return epoch % CHECKPOINT_EVERY == 0

    # ---- logs

    def terms(self, output: PretrainOutput) -> dict[str, Tensor]:
        return {"mi": torch.where(output.penalty_used, output.mi, 0), "mi_used": output.penalty_used}

    def scalars(self, output: PretrainOutput) -> dict[str, Tensor]:
        return {
            "recon": output.recon,
            "mi": output.mi if self.penalty else torch.full_like(output.mi, torch.nan),
            # A sum over ranks; the logs take their mean.
            "skipped_penalties": self.skipped_penalties * self.world.size,
        }

    def epoch_row(self, epoch: int, means: dict[str, float], measured: Measured) -> dict:
        return {
            "epoch": epoch,
            "mi": means["mi"] / means["mi_used"] if self.penalty and means["mi_used"] else None,
            "skipped_penalties": self.world.total(self.skipped_penalties),
        }

    def save_samples(self, folder: Path, position: Position, images: Tensor, output: PretrainOutput) -> None:
        where = {"epoch": position.epoch, "update": position.update, "eps_255": self.config.attack.eps}
        images = model_input(images[:SAMPLES], self.mean, self.std)
        shape = (self.model.patch_size, self.model.norm_pix_loss)
        save_samples(folder / "samples.npz", images, output, *shape, mean=self.mean, std=self.std, position=where)

    # ---- state

    def fit(self, state: dict) -> None:
        """All checkpoints of an autoencoder have the same parameters."""

    def resume(self, state: dict, own: dict, say: Callable[[str], None]) -> None:
        check_resumed(state, own, self.model, self.stream, say)
        if self.world.is_main:
            self.skipped_penalties += own.get("skipped_penalties", 0)

    def state(self) -> dict:
        cache = self.stream.cache if self.stream else None
        return {"skipped_penalties": self.world.total(self.skipped_penalties), "cache": cache}


def build_data(run: Run[PretrainConfig], world: World) -> BatchStream:
    """This rank's share of the training images."""
    d = run.config.data
    sizes = (run.config.model.input_size, run.config.optim.batch_size)
    options = stream_options(run, world) | {"data_threads": d.data_threads, "kernels": run.compute.kernels}
    return build_pretrain_data(d.dataset, d.data_root, *sizes, **options)


def build_model(run: Run[PretrainConfig], device: torch.device) -> MaskedAutoencoder:
    """The model on its device, freshly initialised."""
    m = run.config.model
    return on_device(create_model(m.model, norm_pix_loss=m.norm_pix_loss, **model_options(run)), device)


def build_attack(run: Run[PretrainConfig], images: BatchStream | DatasetInfo, device: torch.device) -> MaeAttack:
    """The attack in the images' units: flags in 1/255, divided by each channel's deviation for normalised images."""
    a = run.config.attack
    if a.attack == "plain":
        return MaeAttack()
    mean, std = (images.mean, images.std) if run.config.data.use_normalize else (None, None)
    bounds = attack_bounds(a.eps, a.alpha, device, mean=mean, std=std)
    scale = FP16_ATTACK_SCALE if run.compute.scaled else 1.0
    return MaeAttack(a.steps, bounds, a.attack_mask_ratio, scale)


def penalty_name(config: PretrainConfig) -> str | None:
    """hsic, dib_mi or renyi2; None without an attack, or for any other word, as in the original."""
    chosen = config.penalty.mi_train
    return chosen if chosen in PENALTIES and config.attack.attack != "plain" else None


def summary(config: PretrainConfig, processes: int = 1) -> str:
    """What a pre-training does beside reconstructing."""
    a, penalty = config.attack, penalty_name(config) or "none"
    if processes > 1 and penalty_name(config):
        whole = config.penalty.penalty_batch == "global"
        penalty += f" of all {processes} processes' images together" if whole else " of each process's own images"
    attack = "none" if a.attack == "plain" else f"{a.steps} step(s), eps {a.eps:g}/255"
    return f"attack {attack}; penalty {penalty}"
