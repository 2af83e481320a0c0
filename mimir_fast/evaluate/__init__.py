"""Evaluation: accuracy of a classifier under attack.  `run_evaluation` in Python, `mimir-fast evaluate` on the command line."""

from mimir_fast.attacks.named import Attack, make_attack, parse_attacks
from mimir_fast.evaluate.evaluation import original_sequence, run_evaluation
from mimir_fast.evaluate.images import Images
from mimir_fast.evaluate.rounds import Sizes

__all__ = ["Attack", "Images", "Sizes", "make_attack", "original_sequence", "parse_attacks", "run_evaluation"]
