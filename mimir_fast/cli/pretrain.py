"""mimir-fast pretrain: adversarial masked-autoencoder pre-training.

Also `python -m mimir_fast.pretrain`, alone or under torchrun.
"""

import sys

from mimir_fast.cli.parser import Command
from mimir_fast.cli.training import train
from mimir_fast.config.pretraining import PretrainConfig
from mimir_fast.config.pretraining_recipes import RECIPES
from mimir_fast.training.train import build_loop

PRETRAIN = Command(
    "mimir-fast pretrain",
    "MIMIR pre-training: a masked autoencoder sees adversarial images and reconstructs the clean ones.",
    PretrainConfig,
    RECIPES,
    original=True,
)


def main(argv: list[str] | None = None) -> int:
    """Run a pre-training; returns the exit status: 0 done or stopped by SIGTERM, 1 failed, 2 wrong input, 130 Ctrl-C."""
    return train(PRETRAIN, argv, build_loop)


if __name__ == "__main__":
    sys.exit(main())
