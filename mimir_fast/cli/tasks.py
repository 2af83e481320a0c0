"""Verbs about a training of either kind: whose flags their words are, pre-training's or fine-tuning's."""

import argparse
from dataclasses import replace

from mimir_fast.cli.finetune import FINETUNE
from mimir_fast.cli.parser import Command
from mimir_fast.cli.pretrain import PRETRAIN

Commands = dict[str, Command]


def commands_for(prog: str, description: str) -> Commands:
    """{task: command} of a verb."""
    tasks = (("pretrain", PRETRAIN), ("finetune", FINETUNE))
    return {task: replace(command, prog=prog, description=description) for task, command in tasks}


def add_task(parser: argparse.ArgumentParser) -> None:
    """The flag --task."""
    words = "whose step, and whose flags the others are (default: %(default)s)"
    parser.add_argument("--task", choices=["pretrain", "finetune"], default="pretrain", help=words)


def command_of(argv: list[str], commands: Commands) -> Command:
    """Whose flags the words are."""
    parser = argparse.ArgumentParser(prog=commands["pretrain"].prog, add_help=False, allow_abbrev=False)
    add_task(parser)
    return commands[parser.parse_known_args(argv)[0].task]
