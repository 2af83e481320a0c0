"""mimir-fast pretrain: configuration -> objects -> loop -> exit.

Also `python -m mimir_fast.pretrain`, alone or under torchrun.
"""

import sys

import torch

from mimir_fast.cli.errors import RUN_ERRORS, complain
from mimir_fast.cli.parser import PRETRAIN, parse_pretrain_args
from mimir_fast.config.pretraining import PretrainConfig
from mimir_fast.config.resolve import resolve, seed_everything
from mimir_fast.training.compilation import keep_compiled_code
from mimir_fast.training.distributed import World, join_world
from mimir_fast.training.loop import Trainer


def main(argv: list[str] | None = None) -> int:
    """Run a pre-training; returns the exit status: 0 done or stopped by SIGTERM, 1 failed, 2 wrong input, 130 Ctrl-C."""
    world = World()
    try:
        config, explicit = parse_pretrain_args(sys.argv[1:] if argv is None else argv)
        config, notes = settle_defaults(config, explicit)
        world = join_world(config.dist, config.run.device)
        seed_everything(config.run.seed + world.rank)
        keep_compiled_code()
        trainer = Trainer(config, world, notes)
    except (ValueError, OSError, torch.OutOfMemoryError) as error:
        complain(PRETRAIN.prog, error)
        world.close()
        return 2
    except KeyboardInterrupt:
        print(f"{PRETRAIN.prog}: stopped before the first update", file=sys.stderr)
        world.close()
        return 130
    try:
        return trainer.run()
    except RUN_ERRORS as error:
        complain(PRETRAIN.prog, error)
        return 1
    finally:
        trainer.close()
        world.close()


def settle_defaults(config: PretrainConfig, explicit: set[str]) -> tuple[PretrainConfig, list[str]]:
    """The configuration with what depends on the machine filled in, and lines to print."""
    run = resolve(config, explicit)
    return config.updated(run.flat()), list(run.notes)


if __name__ == "__main__":
    sys.exit(main())
