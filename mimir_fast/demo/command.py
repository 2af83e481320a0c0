"""mimir-fast demo: the whole method on handwritten digits, in minutes on two CPU cores.  Also `python -m mimir_fast.demo`."""

import argparse
import shlex
import signal
import sys
import time
from pathlib import Path

import yaml
from tqdm import tqdm

from mimir_fast import pretrain
from mimir_fast.data import dataset_info
from mimir_fast.demo.arms import ARMS, Stage, stages
from mimir_fast.demo.page import write_demo_page
from mimir_fast.evaluate import command as evaluate
from mimir_fast.evaluate.autoattack import refusal
from mimir_fast.exits import guarded
from mimir_fast.finetune import command as finetune
from mimir_fast.flags import require

VERBS = {"pretrain": pretrain.main, "finetune": finetune.main, "evaluate": evaluate.main}
STOPPED = 128 + signal.SIGTERM


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="mimir-fast demo",
        description="Pre-train with and without the attack, fine-tune three classifiers alike (from scratch, from the masked "
        "autoencoder, from MIMIR), attack them, and write one page. Handwritten digits, no download, 7 to 8 minutes on two "
        "CPU cores. Stopped or killed, the same command goes on where it was.",
    )
    add = parser.add_argument
    add("--output_dir", default="runs/demo", metavar="FOLDER", help="folder of all runs (default: %(default)s)")
    add("--seed", type=int, default=0, help="seed of all runs (default: %(default)s)")
    add(
        "--aa_images",
        type=int,
        default=8,
        metavar="N",
        help="test images that AutoAttack gets [images]; 0: leave AutoAttack out (default: %(default)s)",
    )
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run what is left of the demo; returns the exit status: 0 done, else that of the stage that ended early."""
    args = build_parser().parse_args(argv)
    return guarded("mimir-fast demo", lambda: demo(args), "stopped; the same command goes on from there")


def demo(args: argparse.Namespace) -> int:
    """All stages, then the page; raises ValueError for wrong input."""
    for name in ("seed", "aa_images"):
        require(getattr(args, name) >= 0, name, getattr(args, name), "0 or more")
    if args.aa_images and (reason := refusal(dataset_info("digits").num_classes)):
        print(f"aa_images: AutoAttack is left out, it {reason}")
        args.aa_images = 0
    root = Path(args.output_dir)
    check_seed(root, args.seed)
    plan = [stage for arm in ARMS for stage in stages(arm, root, args.seed, args.aa_images)]
    status = run_all(plan)
    if status:
        return status
    print(f"report: {write_demo_page(root, args.seed, args.aa_images)}")
    return 0


def check_seed(root: Path, seed: int) -> None:
    """Raises ValueError if the folder holds the runs of another seed, which would be taken up."""
    for path in root.glob("*/*/config.yaml"):
        before = yaml.safe_load(path.read_text()).get("seed")
        require(before == seed, "seed", seed, f"{before}, which {root} was begun with, or another --output_dir")


def run_all(plan: list[Stage]) -> int:
    """Run the stages in order, each in this process; returns the first exit status that is not 0, or 143 after a SIGTERM."""
    began, done, total = time.perf_counter(), 0.0, sum(stage.share for stage in plan)
    for number, stage in enumerate(plan, 1):
        spent = time.perf_counter() - began
        left = f", about {tqdm.format_interval(spent / done * (total - done))} left" if done else ""
        print(
            f"\n[{number}/{len(plan)}{left}] {stage.title}\n$ mimir-fast {stage.verb} {shlex.join(stage.words)}",
            flush=True,
        )
        status = VERBS[stage.verb](stage.words)
        if status == 0 and not stage.product.exists():  # stopped by SIGTERM, which is no failure of the stage
            status = STOPPED
        if status in (STOPPED, 130):
            print("stopped; the same demo command goes on from there")
        if status:
            return status
        done += stage.share
    return 0


if __name__ == "__main__":
    sys.exit(main())
