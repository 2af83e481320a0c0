"""mimir-fast finetune: adversarial fine-tuning of a pre-trained encoder to a robust classifier.

Also `python -m mimir_fast.finetune`, alone or under torchrun.
"""

import sys

from mimir_fast.cli.errors import guarded
from mimir_fast.cli.evaluate import STOPPED
from mimir_fast.cli.parser import Command
from mimir_fast.cli.training import train
from mimir_fast.config.finetuning import FinetuneConfig
from mimir_fast.config.finetuning_recipes import RECIPES
from mimir_fast.config.resolve import Run
from mimir_fast.evaluate.finetune_eval import evaluate
from mimir_fast.evaluate.team import joined
from mimir_fast.training.train import build_loop

FINETUNE = Command(
    "mimir-fast finetune",
    "Adversarial fine-tuning: a pre-trained encoder becomes a robust classifier.",
    FinetuneConfig,
    RECIPES,
    original=True,
)


def main(argv: list[str] | None = None) -> int:
    """Run a fine-tuning; returns the exit status: 0 done or stopped by SIGTERM, 1 failed, 2 wrong input, 130 Ctrl-C."""
    return train(FINETUNE, argv, build_loop, instead=evaluated)


def evaluated(run: Run[FinetuneConfig]) -> int | None:
    """--eval: the exit status of the evaluation, None without the flag."""
    if not run.config.validation.eval:
        return None

    def body() -> int:
        with joined(run.config.dist, run.device) as team:
            team.say(*run.notes)
            return evaluate(run, team)

    return guarded(FINETUNE.prog, body, STOPPED)


if __name__ == "__main__":
    sys.exit(main())
