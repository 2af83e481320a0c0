"""The real trainer for a number of updates, listened to: what `bench train` and `bench profile` share."""

import argparse
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import torch

from bench.images import write_images
from bench.peaks import PEAKS, peak_of
from bench.rows import FINETUNE, PRETRAIN
from bench.step.counts import pretend_gpu
from bench.step.finetuning import RECIPE
from bench.step.variants import DEFAULTS, fill_in
from mimir_fast.cli import finetune, pretrain
from mimir_fast.cli.parser import parse_args
from mimir_fast.config.resolve import Run, resolve
from mimir_fast.training.distributed import World
from mimir_fast.training.loop import Loop
from mimir_fast.training.running import running
from mimir_fast.training.stages import listening

# as little beside the step as possible; flags after -- win
QUIET = "--dataset imagefolder --output_dir= --log_dir= --checkpoint_steps 0".split()
RECIPES = {
    PRETRAIN: "--recipe imagenet_vit_b".split(),
    FINETUNE: f"--recipe {RECIPE} --test_every 0".split(),
}


class EndedEarlyError(Exception):
    """The training stopped before the last observed update."""


def add_arguments(parser: argparse.ArgumentParser, updates: int, warmup: int) -> None:
    """The flags that say what is trained and for how long."""
    add = parser.add_argument
    add("--data_root", default="", help="folder of class folders with images (default: synthetic JPEG files)")
    add("--task", choices=list(DEFAULTS), default=PRETRAIN, help="whose loop (default: %(default)s)")
    add("--model", help="model name (default: mae_vit_base; fine-tuning: vit_base)")
    add("--batch", type=int, help="images per micro-batch (default: 512; fine-tuning: 256)")
    add("--input_size", type=int, default=224, help="image side [pixels] (default: %(default)s)")
    add("--patch_size", type=int, default=16, help="patch side [pixels] (default: %(default)s)")
    add("--updates", type=int, default=updates, help="observed updates (default: %(default)s)")
    add("--warmup", type=int, default=warmup, help="updates before them, compilation included (default: %(default)s)")
    add("--gpu", choices=list(PEAKS), help="whose peaks (default: the GPU found; h100 on a pretend one)")


def check(args: argparse.Namespace) -> None:
    """Fill in the model and the batch of the task; raises ValueError naming the number that is too small."""
    fill_in(args)
    for name in ("batch", "updates", "warmup"):
        if getattr(args, name) < 1:
            raise ValueError(f"{name}: expected 1 or more, got {getattr(args, name)}")


@contextmanager
def open_trainer(args: argparse.Namespace, flags: list[str]) -> Iterator[Loop]:
    """The trainer of these flags, about to run warmup + updates; closed at the end.

    flags: the trainer's own, over everything else.  Raises ValueError if they do not fit, or end the run earlier.
    """
    run = configure(args, flags)
    build = finetune.build if args.task == FINETUNE else pretrain.build
    with tempfile.TemporaryDirectory() as folder:
        if not run.config.data.data_root and run.config.data.dataset == "imagefolder":  # enough that no epoch ends
            count = (args.warmup + args.updates + 1) * run.config.optim.batch_size * run.config.optim.accum_iter
            run = run.updated({"data_root": str(write_images(Path(folder) / "synthetic", count))})
        if pretend_gpu():
            torch.backends.cuda.enable_cudnn_sdp(False)  # cuDNN is not there
        with running(run, build) as trainer:
            if trainer.world.size > 1:
                raise ValueError(f"processes: expected one, got {trainer.world.size}; start it without torchrun")
            yield whole(trainer, args.warmup + args.updates)


def configure(args: argparse.Namespace, flags: list[str]) -> Run:
    """The run that the trainer would begin."""
    sizes = {"model": args.model, "input_size": args.input_size, "patch_size": args.patch_size}
    words = {**sizes, "batch_size": args.batch, "max_steps": args.warmup + args.updates}
    own = [word for name, value in words.items() for word in (f"--{name}", str(value))]
    own = [*RECIPES[args.task], *QUIET, f"--data_root={args.data_root}", *own, *flags]
    command = finetune.FINETUNE if args.task == FINETUNE else pretrain.PRETRAIN
    return resolve(*parse_args(command, own))


def whole(trainer: Loop, count: int) -> Loop:
    """The trainer, if its run is `count` updates long.  Raises ValueError if not."""
    if trainer.total_updates - trainer.position.update != count:
        raise ValueError(
            f"updates: {count} are needed (warmup + updates), but the trainer's flags make it "
            f"{trainer.total_updates - trainer.position.update}; raise --epochs, leave --max_steps and --resume out"
        )
    return trainer


def run(trainer: Loop, opened: Callable[[str], AbstractContextManager], updated: Callable[[int], None]) -> None:
    """Train to the end; updated(n) is called after the n-th update, outside of every stage.

    Raises EndedEarlyError if the training diverges or a signal stops it.
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
        raise EndedEarlyError(f"the training ended with status {status} after {at}")


def device_name(world: World, gpu: str | None) -> str:
    """As records call it: cpu, the GPU's own name, or pretend-NAME."""
    if world.device.type != "cuda":
        return "cpu"
    return f"pretend-{gpu or 'h100'}" if pretend_gpu() else torch.cuda.get_device_name(world.device)


def peaks_name(device: str, gpu: str | None) -> str | None:
    """Key of bench.peaks.PEAKS for the record's device, None where they are not known: on any CPU."""
    if device == "cpu":
        return None
    try:
        return gpu or peak_of(device)
    except ValueError:
        return None
