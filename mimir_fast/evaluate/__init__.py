"""Evaluation: accuracy of a classifier under attack.

In Python `evaluate(config)`, or `run_evaluation` for a model and images of one's own; `mimir-fast evaluate` in a shell.
"""

import sys
from types import ModuleType

from mimir_fast.attacks.named import Attack, make_attack, parse_attacks
from mimir_fast.config.evaluation import EvaluateConfig
from mimir_fast.evaluate.configured import evaluate
from mimir_fast.evaluate.evaluation import original_sequence, run_evaluation
from mimir_fast.evaluate.images import Images
from mimir_fast.evaluate.rounds import Sizes
from mimir_fast.evaluate.team import joined

__all__ = [
    "Attack",
    "Images",
    "Sizes",
    "evaluate",
    "joined",
    "make_attack",
    "original_sequence",
    "parse_attacks",
    "run_evaluation",
]


class _Evaluate(ModuleType):
    """This package, which can be called: `mimir_fast.evaluate(config)` is `evaluate(config)`."""

    def __call__(self, config: EvaluateConfig) -> dict:
        return evaluate(config)


# The package and the public function have one name; a package's class is what decides whether it can be called.
sys.modules[__name__].__class__ = _Evaluate
