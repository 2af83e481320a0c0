"""Running the demo: its commands in order, each in this process."""

import argparse
import shlex
import signal
import time
from pathlib import Path

import yaml
from tqdm import tqdm

from mimir_fast.cli import evaluate, finetune, pretrain
from mimir_fast.config.fields import require
from mimir_fast.data import dataset_info
from mimir_fast.demo.arms import ARMS, Command, commands
from mimir_fast.demo.demo_page import write_demo_page
from mimir_fast.evaluate.autoattack import refusal
from mimir_fast.models.families import find
from mimir_fast.models.family import PREFIX

VERBS = {"pretrain": pretrain.main, "finetune": finetune.main, "evaluate": evaluate.main}
STOPPED = 128 + signal.SIGTERM


def demo(args: argparse.Namespace) -> int:
    """Run all commands, then write the page; raises ValueError for wrong input."""
    find(args.model, False)
    for name in ("seed", "aa_images"):
        require(getattr(args, name) >= 0, name, getattr(args, name), "0 or more")
    if args.aa_images and (reason := refusal(dataset_info("digits").num_classes)):
        print(f"aa_images: AutoAttack is left out, it {reason}")
        args.aa_images = 0
    root = Path(args.output_dir)
    # Before anything runs: commands resume what they find.
    check_begun(root, {"seed": args.seed, "model": args.model, "input_size": args.input_size})
    sizes = (args.model, args.input_size)
    plan = [command for arm in ARMS for command in commands(arm, root, args.seed, args.aa_images, *sizes)]
    status = run_all(plan)
    if status:
        return status
    print(f"report: {write_demo_page(root, args.seed, args.aa_images)}")
    return 0


def check_begun(root: Path, asked: dict[str, int | str]) -> None:
    """Raise ValueError if the folder holds runs of another seed or model, which would be resumed."""
    for path in root.glob("*/*/config.yaml"):
        begun = yaml.safe_load(path.read_text(encoding="utf-8"))
        for name, value in asked.items():
            before = begun.get(name)
            # A pre-training's model is the autoencoder of the same encoder.
            before = before.removeprefix(PREFIX) if name == "model" and before else before
            require(before == value, name, value, f"{before}, which {root} was begun with, or another --output_dir")


def run_all(plan: list[Command]) -> int:
    """Run the commands in order, each in this process; returns the first exit status that is not 0, or 143 after a SIGTERM."""
    began, done, total = time.perf_counter(), 0.0, sum(command.share for command in plan)
    for position, command in enumerate(plan, 1):
        # From this machine's own speed; commands that were finished in an earlier call take no time and make it too short.
        spent = time.perf_counter() - began
        left = f", about {tqdm.format_interval(spent / done * (total - done))} left" if done else ""
        print(
            f"\n[{position}/{len(plan)}{left}] {command.title}\n$ mimir-fast {command.verb} {shlex.join(command.words)}",
            flush=True,
        )
        status = VERBS[command.verb](command.words)
        # A training that SIGTERM stops saves and returns 0.
        if status == 0 and not command.product.exists():
            status = STOPPED
        if status in (STOPPED, 130):
            print("stopped; the same demo command goes on from there")
        if status:
            return status
        done += command.share
    return 0
