"""`python -m mimir_fast.pretrain`: the original's entry point for pre-training; see mimir_fast/cli/pretrain.py."""

from mimir_fast.cli.pretrain import main

__all__ = ["main"]
