"""The real trainer for a number of updates: what `bench train` and `bench profile` share."""

import argparse
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bench import steps
from bench.images import write_images
from mimir_fast.training.loop import Loop
from mimir_fast.training.running import running
from mimir_fast.training.train import build_loop

# as little beside the step as possible; flags that are given win
QUIET = "--dataset imagefolder --output_dir= --log_dir= --checkpoint_steps 0".split()


def add_arguments(parser: argparse.ArgumentParser, updates: int, warmup: int) -> None:
    """The flags that say what is trained and for how long."""
    steps.add_arguments(parser)
    add = parser.add_argument
    add("--data_root", default="", help="folder of class folders with images (default: synthetic JPEG files)")
    add("--updates", type=int, default=updates, help="observed updates (default: %(default)s)")
    add("--warmup", type=int, default=warmup, help="updates before them, compilation included (default: %(default)s)")


@contextmanager
def open_trainer(args: argparse.Namespace, flags: list[str]) -> Iterator[Loop]:
    """The trainer of these flags, about to run warmup + updates; closed at the end.

    flags: the trainer's own, over everything else.  Raises ValueError if they do not fit, or end the run earlier.
    """
    for name in ("updates", "warmup"):
        if getattr(args, name) < 1:
            raise ValueError(f"{name}: expected 1 or more, got {getattr(args, name)}")
    count = args.warmup + args.updates
    own = ["--max_steps", str(count), "--log_every", str(args.warmup)]
    words = [*QUIET, f"--data_root={args.data_root}", *own, *flags]
    if args.task == steps.FINETUNE:
        words = ["--test_every", "0", *words]
    run = steps.asked(args.task, words)
    with tempfile.TemporaryDirectory() as folder:
        flat = run.config.flat()
        if not flat["data_root"] and flat["dataset"] == "imagefolder":  # enough that no epoch ends
            images = (count + 1) * flat["batch_size"] * flat["accum_iter"]
            run = run.updated({"data_root": str(write_images(Path(folder) / "synthetic", images))})
        steps.leave_cudnn_out()
        with running(run, build_loop) as trainer:
            if trainer.world.size > 1:
                raise ValueError(f"processes: expected one, got {trainer.world.size}; start it without torchrun")
            found = trainer.total_updates - trainer.position.update
            if found != count:
                raise ValueError(
                    f"updates: {count} are needed (warmup + updates), but the trainer's flags make it {found}; "
                    "raise --epochs, leave --max_steps and --resume out"
                )
            yield trainer


def run(trainer: Loop) -> None:
    """Train to the end; ends the program with status 1 if the training ended early: it diverged, a signal stopped it."""
    status = trainer.run()
    if status or trainer.position.update < trainer.total_updates:
        at = f"{trainer.position.update} of {trainer.total_updates} updates"
        sys.exit(f"python -m bench: error: the training ended with status {status} after {at}")
