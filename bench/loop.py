"""The real trainer for a number of updates, listened to: what `bench train` and `bench profile` share."""

import argparse
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from bench import steps
from bench.images import write_images
from mimir_fast.training.loop import Loop
from mimir_fast.training.running import running
from mimir_fast.training.stages import listening
from mimir_fast.training.train import build_loop

# as little beside the step as possible; flags after -- win
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
    steps.check(args, "updates", "warmup")
    count = args.warmup + args.updates
    words = [*QUIET, f"--data_root={args.data_root}", *steps.flags_of(args), "--max_steps", str(count), *flags]
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
            yield whole(trainer, count)


def whole(trainer: Loop, count: int) -> Loop:
    """The trainer, if its run is `count` updates long.  Raises ValueError if not."""
    found = trainer.total_updates - trainer.position.update
    if found != count:
        raise ValueError(
            f"updates: {count} are needed (warmup + updates), but the trainer's flags make it {found}; "
            "raise --epochs, leave --max_steps and --resume out"
        )
    return trainer


def run(trainer: Loop, opened: Callable[[str], AbstractContextManager], updated: Callable[[int], object]) -> str:
    """Train to the end; updated(n) is called after the n-th update, outside of every stage.

    Gives why the training ended early (it diverged, a signal stopped it), "" if it did not.
    """
    done = 0

    @contextmanager
    def counted(name: str) -> Iterator[None]:
        nonlocal done
        with opened(name):
            yield
        if name == "optimizer":
            done += 1
            updated(done)

    with listening(counted):
        status = trainer.run()
    if status or trainer.position.update < trainer.total_updates:
        at = f"{trainer.position.update} of {trainer.total_updates} updates"
        return f"the training ended with status {status} after {at}"
    return ""
