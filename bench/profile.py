"""python -m bench profile: a trace of some updates, their most expensive kernels, and commands for NVIDIA's profilers."""

import argparse
import shlex
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import NamedTuple

import torch

from bench import loop, records
from bench.simulated_gpu import marker
from mimir_fast.training.stages import STAGES

TOP = 10
EPILOG = """Trainer flags may follow --.  Ranges are named by stage: see python -m bench train -h.  Backward passes run on the
main thread here, so that their kernels fall into their stages.  The trace opens in https://ui.perfetto.dev or
chrome://tracing.  Times under a profiler are longer than without: python -m bench train measures."""


class Profiler(NamedTuple):
    """What opens a stage's range, what starts and stops around the observed updates, and what is to be said afterwards."""

    opened: Callable[[str], AbstractContextManager]
    start: Callable[[], object]
    stop: Callable[[], object]
    lines: Callable[[], list[str]]


def build_parser() -> argparse.ArgumentParser:
    parser = records.parser("profile", __doc__, EPILOG)
    loop.add_arguments(parser, updates=3, warmup=5)
    add = parser.add_argument
    add("--output", default="runs/profile", metavar="FOLDER", help="where the trace goes (default: %(default)s)")
    ranges = "NVTX ranges, and the start and stop signals that nsys and ncu wait for; no trace of its own (GPUs)"
    add("--ranges_only", action="store_true", help=ranges)
    return parser


def run(args: argparse.Namespace, flags: list[str]) -> int:
    """Profile and print; returns the exit status: 0, or 1 if the training ended early."""
    profiler = nvtx_ranges() if args.ranges_only else torch_profiler(Path(args.output) / "trace.json.gz")
    with torch.autograd.set_multithreading_enabled(False), loop.open_trainer(args, flags) as trainer:
        device = trainer.world.device

        def updated(count: int) -> None:
            """The profiler sees the updates after the warm-up, the device drained at both ends."""
            if count in (args.warmup, args.warmup + args.updates) and device.type == "cuda":
                torch.cuda.synchronize(device)
            if count == args.warmup:
                profiler.start()
            elif count == args.warmup + args.updates:
                profiler.stop()

        if why := loop.run(trainer, profiler.opened, updated):
            print(f"python -m bench profile: error: {why}", file=sys.stderr)
            return 1
        name = records.device_name(device)
    print(f"{args.updates} updates after {args.warmup} of {args.model}, batch {args.batch}; {name}")
    print(*profiler.lines(), *(commands(args, flags) if name != "cpu" else []), sep="\n")
    return 0


def nvtx_ranges() -> Profiler:
    """NVTX ranges, cudaProfilerStart and cudaProfilerStop.  Raises ValueError without a GPU."""
    if not torch.cuda.is_available():
        raise ValueError("ranges_only: no CUDA device here; NVIDIA's profilers look at GPUs only")
    signals = torch.cuda.profiler.start, torch.cuda.profiler.stop
    return Profiler(torch.cuda.nvtx.range, *signals, lambda: ["NVTX ranges only, no trace"])


def torch_profiler(trace: Path) -> Profiler:
    """torch.profiler with a range for every stage; the trace is written where `trace` says."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if torch.cuda.is_available() and not marker():
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    profile = torch.profiler.profile(activities=activities)

    def lines() -> list[str]:
        trace.parent.mkdir(parents=True, exist_ok=True)
        profile.export_chrome_trace(str(trace))
        return [*most_expensive(profile.key_averages()), f"trace: {trace}"]

    return Profiler(torch.profiler.record_function, profile.start, profile.stop, lines)


def most_expensive(rows) -> list[str]:
    """The kernels with the most time in all, where a GPU was observed; else the operations.  None on a simulated GPU."""
    if marker():
        return ["a simulated GPU: no kernel runs and none has a time; the trace shows the host only"]
    rows = [row for row in rows if row.key not in STAGES]
    kernels = [row for row in rows if row.device_type == torch.autograd.DeviceType.CUDA and not row.is_user_annotation]
    times = [(row.self_device_time_total, row.count, row.key) for row in kernels]
    what = "kernels"
    if not kernels:
        what = "operations on the host"
        times = [(row.self_cpu_time_total, row.count, row.key) for row in rows]
    whole, shown = sum(us for us, *_ in times) or 1.0, sorted(times, reverse=True)[:TOP]
    head = f"the {len(shown)} most expensive {what} of {len(times)} (calls, ms, share)"
    return [head, *(f"{count:7d}{us / 1e3:11.3f}{us / whole:8.1%}  {name[:120]}" for us, count, name in shown)]


def commands(args: argparse.Namespace, flags: list[str]) -> list[str]:
    """nsys and ncu around this same run, ready to paste."""
    names = ("task", "model", "batch", "input_size", "patch_size", "warmup", "data_root", "output")
    own = [word for name in names if (value := getattr(args, name)) != "" for word in (f"--{name}", str(value))]
    again = ["python", "-m", "bench", "profile", "--ranges_only", *own]
    rest = ["--", *flags] if flags else []
    nsys = "nsys profile --trace=cuda,nvtx,osrt --capture-range=cudaProfilerApi --capture-range-end=stop"
    ncu = "ncu --profile-from-start off --nvtx --nvtx-include attack/ --set full --launch-count 40"
    return [
        "timeline with the stages as NVTX rows:",
        f"  {nsys} --force-overwrite=true --output={args.output}/nsys {shlex.join([*again, *rest])}",
        "the attack's first 40 kernels in detail (any other stage's name in its place):",
        f"  {ncu} --force-overwrite --export {args.output}/ncu {shlex.join([*again, '--updates', '1', *rest])}",
    ]
