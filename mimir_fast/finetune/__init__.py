"""`python -m mimir_fast.finetune`: the original's entry point for fine-tuning; see mimir_fast/cli/finetune.py."""

from mimir_fast.cli.finetune import main

__all__ = ["main"]
