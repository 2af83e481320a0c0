"""mimir-fast finetune: configuration -> objects -> loop -> exit.

Also `python -m mimir_fast.finetune`, alone or under torchrun.
"""

import os
import sys

import torch

from mimir_fast.cli.errors import RUN_ERRORS, complain, guarded
from mimir_fast.cli.evaluate import STOPPED
from mimir_fast.cli.parser import Command, parse_args
from mimir_fast.config.finetuning import FinetuneConfig
from mimir_fast.config.finetuning_recipes import RECIPES
from mimir_fast.config.resolve import resolve, seed_everything
from mimir_fast.evaluate.finetune_eval import evaluate
from mimir_fast.training.compilation import keep_compiled_code
from mimir_fast.training.distributed import World, find_rank, join_world
from mimir_fast.training.finetune_trainer import Trainer

FINETUNE = Command(
    "mimir-fast finetune",
    "Adversarial fine-tuning: a pre-trained encoder becomes a robust classifier.",
    FinetuneConfig,
    RECIPES,
    original=True,
)


def main(argv: list[str] | None = None) -> int:
    """Run a fine-tuning; returns the exit status: 0 done or stopped by SIGTERM, 1 failed, 2 wrong input, 130 Ctrl-C."""
    world = World()
    try:
        config, explicit = parse_args(FINETUNE, sys.argv[1:] if argv is None else argv)
        config, notes = settle_defaults(config, explicit)
        if config.validation.eval:
            if find_rank(config.dist, os.environ)[0]:
                return 0  # one process evaluates
            for note in notes:
                print(note)
            return guarded(FINETUNE.prog, lambda: evaluate(config, explicit), STOPPED)
        world = join_world(config.dist, config.run.device)
        seed_everything(config.run.seed + world.rank)
        keep_compiled_code()
        trainer = Trainer(config, world, notes)
    except (ValueError, OSError, torch.OutOfMemoryError) as error:
        complain(FINETUNE.prog, error)
        world.close()
        return 2
    except KeyboardInterrupt:
        print(f"{FINETUNE.prog}: stopped before the first update", file=sys.stderr)
        world.close()
        return 130
    try:
        return trainer.run()
    except KeyboardInterrupt:  # the second one
        return 130
    except RUN_ERRORS as error:
        complain(FINETUNE.prog, error)
        return 1
    finally:
        trainer.close()
        world.close()


def settle_defaults(config: FinetuneConfig, explicit: set[str]) -> tuple[FinetuneConfig, list[str]]:
    """The configuration with what depends on the machine filled in, and lines to print."""
    run = resolve(config, explicit)
    return config.updated(run.flat()), list(run.notes)


if __name__ == "__main__":
    sys.exit(main())
