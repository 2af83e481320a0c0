"""python -m bench profile: a trace of some updates, the time of their stages, and their most expensive kernels."""

import argparse
import itertools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import torch

from bench import loop, records
from bench.simulated_gpu import marker
from mimir_fast.training import stages
from mimir_fast.training.stages import listening

EPILOG = f"""Other flags are the trainer's.  Stages (mimir_fast/training/stages.py):
{(stages.__doc__ or "").partition(chr(10))[2].strip()}
Backward passes run on the main thread here, so that their kernels fall into their stages.  The trace opens in
https://ui.perfetto.dev.  Times under a profiler are longer than without: python -m bench train measures.

NVIDIA's profilers want the same command with --ranges_only behind their own words; a timeline with the stages as rows:
  nsys profile --trace=cuda,nvtx,osrt --capture-range=cudaProfilerApi --capture-range-end=stop -o runs/profile/nsys \\
      python -m bench profile --ranges_only
the attack's first 40 kernels in detail (any other stage's name in its place; the slash: a range that is pushed and popped):
  ncu --profile-from-start off --nvtx --nvtx-include attack/ --set full --launch-count 40 --export runs/profile/ncu \\
      python -m bench profile --ranges_only --updates 1"""


Opened = Callable[[str], AbstractContextManager]


def build_parser() -> argparse.ArgumentParser:
    parser = records.parser("profile", __doc__, EPILOG)
    loop.add_arguments(parser, updates=3, warmup=5)
    add = parser.add_argument
    add("--output", default="runs/profile", metavar="FOLDER", help="where the trace goes (default: %(default)s)")
    add("--ranges_only", action="store_true", help="NVTX ranges for NVIDIA's profilers in place of a trace (GPUs)")
    return parser


def run(args: argparse.Namespace, flags: list[str]) -> int:
    """Profile and print."""
    if args.ranges_only and not torch.cuda.is_available():
        raise ValueError("ranges_only: no CUDA device here; NVIDIA's profilers look at GPUs only")
    opened = torch.cuda.nvtx.range if args.ranges_only else torch.profiler.record_function
    observed = cuda_profiler(args) if args.ranges_only else traced(args)
    with torch.autograd.set_multithreading_enabled(False), loop.open_trainer(args, flags) as trainer:
        name, config = records.device_name(trainer.world.device), trainer.config.flat()
        with observed as updated, listening(counted(opened, updated)):
            loop.run(trainer)
    batch = f"batch {config['batch_size']}"
    print(f"{args.updates} updates after {args.warmup} of {config['model']}, {batch}; {name}")
    return 0


def counted(opened: Opened, updated: Callable[[], object]) -> Opened:
    """Contexts for the stages; updated() is called after every update, outside of every stage."""

    @contextmanager
    def stage(name: str) -> Iterator[None]:
        with opened(name):
            yield
        if name == "optimizer":
            updated()

    return stage


@contextmanager
def cuda_profiler(args: argparse.Namespace) -> Iterator[Callable[[], object]]:
    """For nsys and ncu: their profiler sees the updates after the warm-up, the device drained at both ends."""
    done = itertools.count(1)

    def updated() -> None:
        number = next(done)
        if number in (args.warmup, args.warmup + args.updates):
            torch.cuda.synchronize()
            (torch.cuda.profiler.start if number == args.warmup else torch.cuda.profiler.stop)()

    yield updated


@contextmanager
def traced(args: argparse.Namespace) -> Iterator[Callable[[], object]]:
    """torch.profiler over the same updates; at the end the trace in a file, the stages' time, the most expensive kernels.

    On a CPU the most expensive operations.
    """
    activities, on_gpu = [torch.profiler.ProfilerActivity.CPU], torch.cuda.is_available() and not marker()
    if on_gpu:
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    schedule = torch.profiler.schedule(wait=args.warmup - 1, warmup=1, active=args.updates, repeat=1)
    with torch.profiler.profile(activities=activities, schedule=schedule) as profile:
        yield profile.step
    trace = Path(args.output) / "trace.json.gz"
    trace.parent.mkdir(parents=True, exist_ok=True)
    profile.export_chrome_trace(str(trace))
    if marker():
        print("a simulated GPU: no kernel runs and none has a time; these are the host's")
    rows, attribute = profile.key_averages(), "device_time_total" if on_gpu else "cpu_time_total"
    print("stages, what lies inside of them included")
    for name in stages.STAGES:
        print(f"{name:<10}{sum(getattr(row, attribute) for row in rows if row.key == name) / 1e3:12.3f} ms")
    where = "self_cuda_time_total" if on_gpu else "self_cpu_time_total"
    print(rows.table(sort_by=where, row_limit=10, max_name_column_width=80), f"trace: {trace}", sep="\n")
