"""mimir-fast evaluate: accuracy of a classifier, clean and under attack.  Also `python -m mimir_fast.evaluate`."""

import sys

from mimir_fast.cli.errors import guarded
from mimir_fast.cli.parser import Command, parse_args
from mimir_fast.config.evaluation import RECIPES, EvaluateConfig
from mimir_fast.config.resolve import resolve_device
from mimir_fast.config.sections import DistConfig
from mimir_fast.evaluate.configured import evaluate
from mimir_fast.evaluate.team import joined

DESCRIPTION = """Accuracy of a classifier, clean and under attack, with 95 % intervals.  An image counts as robust if the
model is right on it unattacked and after the attack.  Every batch is saved: the same command goes on where it was stopped,
other attacks are added to the results.  Under torchrun or srun all processes share the images.
Exit status: 0 done, 1 failed, 2 wrong input, 130 Ctrl-C."""
COMMAND = Command("mimir-fast evaluate", DESCRIPTION, EvaluateConfig, RECIPES)
STOPPED = "stopped; finished batches are saved, the same command goes on from there"


def main(argv: list[str] | None = None) -> int:
    """Evaluate, print a table, write results.json; returns the exit status."""
    words = sys.argv[1:] if argv is None else argv

    def body() -> int:
        config, explicit = parse_args(COMMAND, words)
        with joined(DistConfig(), resolve_device(config.run.device, explicit, say=lambda line: None)) as team:
            evaluate(config, explicit, team)
        return 0

    return guarded(COMMAND.prog, body, STOPPED)


if __name__ == "__main__":
    sys.exit(main())
