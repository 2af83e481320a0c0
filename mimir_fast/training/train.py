"""A training from Python: `mimir_fast.train(config)`, and the loop of a run of either kind."""

from pathlib import Path
from typing import NamedTuple, TypeVar, cast

from mimir_fast.config.finetuning import FinetuneConfig
from mimir_fast.config.machine import prepare_machine
from mimir_fast.config.pretraining import PretrainConfig
from mimir_fast.config.resolve import Run, resolve
from mimir_fast.training import finetuning, pretraining
from mimir_fast.training.distributed import World
from mimir_fast.training.finetuning import Finetuning
from mimir_fast.training.loop import Loop
from mimir_fast.training.pretraining import Pretraining
from mimir_fast.training.running import running

Config = TypeVar("Config", PretrainConfig, FinetuneConfig)


class TrainResult(NamedTuple):
    """How a training ended.

    status       0 done (or stopped by SIGTERM), 1 diverged, 130 stopped by Ctrl-C
    epoch        epochs done; update: optimizer updates done
    output_dir   folder of the checkpoints and logs, None if nothing was saved
    """

    status: int
    epoch: int
    update: int
    output_dir: Path | None


def train(config: Config) -> TrainResult:
    """Pre-train or fine-tune as `mimir-fast pretrain` and `mimir-fast finetune` do; may be called again in one process.

    config   PretrainConfig().updated({"model": "mae_vit_small", "attack": "pgd_mae", "eps": 8.0, ...}) or a FinetuneConfig;
             a flag is called as on the command line (eps and alpha in 1/255, batch_size in images per process) and counts
             as asked for where `updated` names it; a recipe is such a configuration
             (mimir_fast.config.pretraining_recipes.RECIPES["imagenet_vit_b"]())
    Images [B,3,H,W], labels [B]: read from the data set that the configuration names.  Several processes: start the program
    with torchrun, every process calls.
    Raises ValueError naming the flag that is wrong, DataError or CheckpointError for files that cannot be used, OSError
    where the disk refuses, torch.OutOfMemoryError, KeyboardInterrupt at a second Ctrl-C.  The first Ctrl-C saves and returns.
    Source: MIMIR, arXiv 2312.04960.
    """
    if isinstance(config, FinetuneConfig) and config.validation.eval:
        raise ValueError("eval: got True, expected False: call mimir_fast.evaluate with an EvaluateConfig to evaluate")
    prepare_machine()
    explicit = config.changed() | config.given
    run = resolve(config.completed(explicit).check(), explicit)
    with running(run, build_loop) as loop:
        status = loop.run()
        return TrainResult(status, loop.position.epoch, loop.position.update, loop.folder)


def build_loop(run: Run, world: World) -> Loop:
    """The loop of a run, with its task and this process's images.  Raises ValueError for what cannot be built."""
    return Loop(build_task(run, world, data=True), world)


def build_task(run: Run, world: World, data: bool = False) -> Pretraining | Finetuning:
    """The task of a run, with or without images to train on.  Raises ValueError for what cannot be built."""
    if isinstance(run.config, PretrainConfig):
        asked = cast(Run[PretrainConfig], run)
        return Pretraining(asked, world, pretraining.build_data(asked, world) if data else None)
    tuned = cast(Run[FinetuneConfig], run)
    return Finetuning(tuned, world, finetuning.build_data(tuned, world) if data else None)
