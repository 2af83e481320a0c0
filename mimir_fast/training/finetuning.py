"""Fine-tuning task: the classification, its attack, schedules by epoch, and validation."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mimir_fast.attacks.apgd import momentum_step
from mimir_fast.attacks.linf import attack_bounds, linf_step, starting_point
from mimir_fast.checkpoints.reader import Contents, read
from mimir_fast.checkpoints.run_state import Position
from mimir_fast.config.choices import ORIGINAL
from mimir_fast.config.finetuning import FinetuneConfig
from mimir_fast.config.resolve import Run
from mimir_fast.data import (
    Augment,
    BatchStream,
    DataError,
    build_train_data,
    dataset_info,
    mix_as_drawn,
    mixing_draws,
    mixing_seed,
    to_float,
)
from mimir_fast.data.datasets import DatasetInfo
from mimir_fast.data.splits import check_same_classes
from mimir_fast.models import Classifier, create_classifier
from mimir_fast.models.families import family_of
from mimir_fast.objectives.adversarial_losses import cross_entropy
from mimir_fast.objectives.classification import ClassificationObjective
from mimir_fast.training.attack_schedule import build_mixing, radius_and_step, warms_up
from mimir_fast.training.compilation import Compiler
from mimir_fast.training.distributed import World
from mimir_fast.training.finetune_step import (
    FP16_ATTACK_SCALE,
    ClassifierAttack,
    ClassifierAttackFunctions,
    ClassifierNoise,
    FinetuneOutput,
    draw_noise,
    finetune_step,
    image_logits,
    image_losses,
)
from mimir_fast.training.layer_decay import build_optimizer
from mimir_fast.training.optimizer import Updater
from mimir_fast.training.options import check_resumed, model_options, on_device, stream_options
from mimir_fast.training.pretrained_start import start_from_pretrained
from mimir_fast.training.task import Measured
from mimir_fast.training.validator import Validator, best_so_far, criterion

# Epochs, as in the original.
CHECKPOINT_EVERY, CHECKPOINT_ALSO = 20, 49


class Finetuning:
    """Adversarial fine-tuning of a classifier: a Task (see task.py); raises ValueError for what cannot be built.

    stream   this process's images, which also say how many classes there are; None: a step needs none
    Until `start_epoch` the attack is the last epoch's.
    """

    tags = {"loss": "loss", "lr": "lr"}  # noqa: RUF012 (the original's; nobody changes it)
    pixels = torch.float32

    def __init__(self, run: Run[FinetuneConfig], world: World, stream: BatchStream | None = None):
        if stream is not None:
            run = run.updated({"nb_classes": stream.num_classes})
        self.run, self.world, self.stream = run, world, stream
        self.config = config = run.config
        self.model = build_model(run, stream or dataset_info(config.data.dataset), world.device)
        self.average_decay = config.optim.model_ema_decay if config.optim.model_ema else None
        self.summary = summary(config)
        self.bounds = torch.empty(4, 3, device=world.device)
        self.attack = build_attack(run, self.bounds)
        self.uncapturable = "dib_mi waits for eigenvalues" if config.penalty.mi_loss == "dib_mi" else ""
        self.pretrained: Contents | None = None
        self.start_epoch(config.optim.epochs - 1)

    # ---- the step

    def updater(self, lr: float) -> Updater:
        o = self.config.optim
        optimizer = build_optimizer(self.model, lr, o.weight_decay, o.layer_decay, decay_tables=o.decay_tables)
        return Updater(optimizer, self.world.device, self.run.compute.scaled, max_norm=o.clip_grad)

    def attack_functions(self, compiler: Compiler) -> ClassifierAttackFunctions:
        return ClassifierAttackFunctions(
            losses=compiler.attacked(image_losses),
            logits=compiler.attacked(image_logits),
            begin=partial(compiler.operation(starting_point), kernels=self.model.kernels),
            step=compiler.pixels(linf_step),
            move=compiler.pixels(momentum_step),
        )

    def objective(self, model: Classifier, compiler: Compiler) -> ClassificationObjective:
        a, p = self.config.attack, self.config.penalty
        criterion = partial(cross_entropy, smoothing=self.config.augment.smoothing)
        information = (p.mi_xz, p.mi_yz) if p.mi_loss == "dib_mi" else None
        features = compiler.trained(model.forward_features)
        return ClassificationObjective(model, a.attack_train, criterion, a.trades_beta, information, features)

    def host_draws(self, images: Tensor, epoch: int, step: int) -> Tensor | None:
        if self.mixing is None:
            return None
        seed = mixing_seed(self.config.run.seed, self.world.rank, epoch, step)
        return mixing_draws(self.mixing, images, seed)

    def prepare(self, images: Tensor, labels: Tensor, draws: Tensor | None) -> tuple[Tensor, Tensor]:
        images = to_float(images)
        if self.mixing is None or draws is None:
            return images, labels
        return mix_as_drawn(self.mixing, images, labels, draws)

    def draw_noise(self, generator: torch.Generator, batch: tuple[Tensor, Tensor]) -> ClassifierNoise:
        return draw_noise(generator, self.model, batch[0], self.attack)

    def step(
        self,
        objective: nn.Module,
        attacked: Classifier,
        functions: ClassifierAttackFunctions,
        batch: tuple[Tensor, Tensor],
        noise: ClassifierNoise,
    ) -> FinetuneOutput:
        return finetune_step(objective, attacked, *batch, noise, self.attack, functions)

    # ---- epochs

    def start_epoch(self, epoch: int) -> None:
        eps, alpha = radius_and_step(self.config.attack, epoch, self.config.optim.epochs)
        # In place: a captured step reads the bounds where they were.
        self.bounds.copy_(attack_bounds(eps, alpha, self.bounds.device))
        self.mixing = build_mixing(self.config, epoch)
        self.form = self.mixing is not None

    def end_epoch(self, engine, epoch: int, ends: Callable[[], bool]) -> Measured | None:
        if self.validator.due(epoch):
            # Validation may need the memory that captured steps hold.
            engine.captured.release()
        trained = engine.attacked if engine.average else None
        row = self.validator.rate(engine.rated, engine.functions, epoch, ends, engine.captured.recorder, trained)
        return None if row is None else Measured(row, self.validator.is_best)

    def keeps(self, epoch: int) -> bool:
        return epoch % CHECKPOINT_EVERY == 0 or epoch == CHECKPOINT_ALSO

    # ---- logs

    def terms(self, output: FinetuneOutput) -> dict[str, Tensor]:
        return {}

    def scalars(self, output: FinetuneOutput) -> dict[str, Tensor]:
        return {}

    def epoch_row(self, epoch: int, means: dict[str, float], measured: Measured) -> dict:
        """The original's columns first."""
        row = dict(measured.row)
        tests = {name: row.pop(name) for name in ("test_loss", "test_acc1", "test_acc5")}
        trained = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
        return {**tests, "epoch": epoch, "n_parameters": trained, **row}

    def save_samples(self, folder: Path, position: Position, images: Tensor, output: FinetuneOutput) -> None:
        """None."""

    # ---- state

    def fit(self, state: dict) -> None:
        source = self.config.model.finetune
        self.pretrained = read(source, "finetune") if source and not state else None
        tensors = self.pretrained.tensors if self.pretrained else state.get("model", {})
        family = family_of(self.model)
        family.adapt(self.model, family.of_classifier(tensors))

    def resume(self, state: dict, own: dict, say: Callable[[str], None]) -> None:
        check_resumed(state, own, self.model, self.stream, say)
        if not state:
            start_from_pretrained(self.model, self.config, say, self.pretrained)
            self.pretrained = None
        elif self.average_decay is not None and "model_ema" not in state:
            say("model_ema: the resumed run kept no average; it starts from the parameters of now")
        elif self.average_decay is None and "model_ema" in state:
            say("model_ema: the resumed run kept an average; without the flag it ends here")
        check_same_classes(own.get("classes"), self._classes(), "the resumed checkpoint")
        self.validator = Validator(self.run, self.world, best_so_far(own, self.config, say))

    def state(self) -> dict:
        best = {"best": self.validator.best, "best_by": criterion(self.config)}
        return {**best, "classes": self._classes(), "cache": self.stream.cache if self.stream else None}

    def _classes(self) -> list[str]:
        """Names in the head's order."""
        return self.stream.classes if self.stream else []


def build_data(run: Run[FinetuneConfig], world: World) -> BatchStream:
    """This rank's share of the training images.  Raises DataError for images of a single class."""
    config = run.config
    d, a = config.data, config.augment
    stream = build_train_data(
        d.dataset,
        d.data_root,
        config.model.input_size,
        config.optim.batch_size,
        augment=Augment(a.aa, a.color_jitter, a.reprob, a.remode, a.recount),
        num_classes=config.model.nb_classes,
        held_out=config.validation.held_out,
        edm_aug=d.edm_aug,
        warmup_aa=warms_up(config),
        **stream_options(run, world),
    )
    if stream.num_classes < 2:
        raise DataError(f"nb_classes: {d.dataset} in {d.data_root} has one class; a classifier needs two or more")
    return stream


def build_model(run: Run[FinetuneConfig], images: BatchStream | DatasetInfo, device: torch.device) -> Classifier:
    """The classifier on its device, freshly initialised; images in [0,1] are normalised inside of it, if at all."""
    m, d = run.config.model, run.config.data
    constants: dict[str, Any] = {"mean": images.mean, "std": images.std} if d.use_normalize else {}
    heads: dict[str, Any] = {"num_classes": m.nb_classes, "global_pool": m.global_pool, "drop_path": m.drop_path}
    return on_device(create_classifier(m.model, **heads, **constants, **model_options(run)), device)


def build_attack(run: Run[FinetuneConfig], bounds: Tensor) -> ClassifierAttack:
    """The training attack, in pixels of [0,1]; bounds [4,3] are written anew for every epoch."""
    attack, loss_scale = run.config.attack, FP16_ATTACK_SCALE if run.compute.scaled else 1.0
    shared = run.config.run.compat == ORIGINAL
    return ClassifierAttack(attack.attack_train, attack.steps, bounds, loss_scale, attack.trades_beta, shared)


def summary(config: FinetuneConfig) -> str:
    """What a fine-tuning does, in a line."""
    a, v, o = config.attack, config.validation, config.optim
    listed = f", best.pth chosen by {v.val_list}" if v.val_list else ""
    cut = ", images as they are" if v.eval_resize == "none" else ""
    attack = "none" if a.attack_train == "plain" else f"{a.attack_train}, {a.steps} step(s), eps {a.eps:g}/255"
    average = f"{o.model_ema_decay:g}" if o.model_ema else "none"
    return (
        f"{config.model.nb_classes} classes, {v.held_out} images held out{listed}; attack {attack}; "
        f"validation attack {v.val_attack}{cut}; layer decay {o.layer_decay:g}; average {average}"
    )
