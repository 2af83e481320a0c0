"""mimir-fast pretrain: configuration -> objects -> loop -> exit.

Also `python -m mimir_fast.pretrain`, alone or under torchrun.
"""

import sys
from dataclasses import replace

import torch

from mimir_fast.cli.errors import RUN_ERRORS, complain
from mimir_fast.cli.parser import PRETRAIN, parse_pretrain_args
from mimir_fast.config.pretraining import ComputeConfig, PretrainConfig
from mimir_fast.config.resolve import seed_everything, settle_machine
from mimir_fast.objectives.information import PENALTIES
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


def settle_defaults(
    config: PretrainConfig, explicit: set[str], pretend: bool = False
) -> tuple[PretrainConfig, list[str]]:
    """Fill in what depends on the machine (device, precision, compilation); returns the configuration and lines to print.

    pretend: the device need not be there.
    """
    run, compute, notes = settle_machine(config.run, config.compute, explicit, pretend)
    compute = _settle_parallel(compute, explicit)
    if config.penalty.mi_train not in (*PENALTIES, "plain"):
        notes.append(
            f"mi_train: {config.penalty.mi_train!r} is none of {', '.join(PENALTIES)}: NO penalty, as in the original"
        )
    if config.attack.attack == "plain" and config.penalty.mi_train in PENALTIES:
        notes.append(
            "attack: plain switches the penalty off too, as in the original; --attack pgd_mae switches both on"
        )
    return replace(config, run=run, compute=compute), notes


def _settle_parallel(compute: ComputeConfig, explicit: set[str]) -> ComputeConfig:
    """What goes with shards of a model."""
    if compute.parallel != "fsdp":
        return compute
    if compute.precision == "fp16":
        raise ValueError("parallel: fsdp goes with --precision bf16 or fp32, not with fp16")
    if compute.compile_region == "model" and "compile_region" in explicit:
        raise ValueError(
            "compile_region: fsdp gathers parameters block by block and compiles so too; leave the flag out"
        )
    return replace(compute, compile_region="block")


if __name__ == "__main__":
    sys.exit(main())
