"""python -m bench profile: a trace of some updates, their most expensive kernels, and commands for NVIDIA's profilers."""

import argparse
import shlex
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import NamedTuple

import torch

from bench import proton
from bench.records import partition
from bench.step.counts import pretend_gpu
from bench.training import EndedEarlyError, add_arguments, check, device_name, open_trainer, run
from mimir_fast.training.stages import STAGES

TOP = 10
DOMAIN = "mimir_fast"  # of the NVTX ranges
EPILOG = """Trainer flags may follow --.  Ranges are named by stage: see python -m bench train -h.  Backward passes run on the
main thread here, so that their kernels fall into their stages.  The trace opens in https://ui.perfetto.dev or
chrome://tracing.  Times under a profiler are longer than without: python -m bench train measures."""


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench profile",
        description=__doc__.split(": ", 1)[1],
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_arguments(parser, updates=3, warmup=5)
    add = parser.add_argument
    add("--output", default="runs/profile", metavar="FOLDER", help="where the trace goes (default: %(default)s)")
    how = parser.add_mutually_exclusive_group()
    ranges = "NVTX ranges, and the start and stop signals that nsys and ncu wait for; no trace of its own (needs nvtx)"
    how.add_argument("--ranges_only", action="store_true", help=ranges)
    how.add_argument(
        "--proton", action="store_true", help="Triton's profiler in place of torch's: kernels by stage (GPU)"
    )
    return parser


def main(arguments: list[str]) -> int:
    """Profile and print; returns the exit status: 0, 1 if the training failed, 2 with one line on wrong input."""
    own, flags = partition(arguments)
    args = build_parser().parse_args(own)
    try:
        check(args)
        profiler = choose(args)
        with torch.autograd.set_multithreading_enabled(False), open_trainer(args, flags) as trainer:
            if trainer.world.device.type != "cuda" and args.proton:
                raise ValueError("proton: the trainer's flags choose the CPU; it profiles GPUs only")
            observe(trainer, profiler, args)
            found = profiler.lines()
            device = device_name(trainer.world, args.gpu)
    except ValueError as error:
        print(f"python -m bench profile: error: {error}", file=sys.stderr)
        return 2
    except EndedEarlyError as error:
        print(f"python -m bench profile: error: {error}", file=sys.stderr)
        return 1
    print(f"{args.updates} updates after {args.warmup} of {args.model}, batch {args.batch}; {device}")
    print(*found, *commands(own, flags, args.output, device != "cpu"), sep="\n")
    return 0


class Profiler(NamedTuple):
    """What opens a stage's range, what starts and stops around the observed updates, and what is to be said afterwards."""

    opened: Callable[[str], AbstractContextManager]
    start: Callable[[], object]
    stop: Callable[[], object]
    lines: Callable[[], list[str]]


def choose(args: argparse.Namespace) -> Profiler:
    """The profiler asked for.  Raises ValueError naming what is missing for it."""
    if args.ranges_only:
        return nvtx_ranges()
    output = Path(args.output)
    if args.proton:
        session = proton.Session(output / "proton")
        return Profiler(session.opened, session.start, session.stop, lambda: session.lines(TOP))
    return torch_profiler(output / "trace.json.gz")


def observe(trainer, profiler: Profiler, args: argparse.Namespace) -> None:
    """Run the trainer; the profiler sees the updates after the warm-up, the device drained at both ends."""
    device = trainer.world.device

    def updated(count: int) -> None:
        if count in (args.warmup, args.warmup + args.updates) and device.type == "cuda":
            torch.cuda.synchronize(device)
        if count == args.warmup:
            profiler.start()
        elif count == args.warmup + args.updates:
            profiler.stop()

    run(trainer, profiler.opened, updated)


def nvtx_ranges() -> Profiler:
    """NVTX ranges in the domain `mimir_fast`; on CUDA cudaProfilerStart and cudaProfilerStop."""
    try:
        import nvtx
    except ImportError as error:
        raise ValueError("ranges_only: the package nvtx is not installed; pip install nvtx") from error
    signals = [lambda: None] * 2
    if torch.cuda.is_available():
        signals = [torch.cuda.profiler.start, torch.cuda.profiler.stop]
    return Profiler(lambda name: nvtx.annotate(name, domain=DOMAIN), *signals, lambda: ["NVTX ranges only, no trace"])


def torch_profiler(trace: Path) -> Profiler:
    """torch.profiler with a range for every stage; the trace is written where `trace` says."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if torch.cuda.is_available() and not pretend_gpu():
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    profile = torch.profiler.profile(activities=activities)

    def lines() -> list[str]:
        trace.parent.mkdir(parents=True, exist_ok=True)
        profile.export_chrome_trace(str(trace))
        return [*most_expensive(profile.key_averages()), f"trace: {trace}"]

    return Profiler(torch.profiler.record_function, profile.start, profile.stop, lines)


def most_expensive(rows) -> list[str]:
    """The kernels with the most time in all, where a GPU was observed; else the operations.  On a pretend GPU, no times."""
    if pretend_gpu():
        return ["a pretend GPU: no kernel runs and none has a time; the trace shows the host only"]
    rows = [row for row in rows if row.key not in STAGES]
    kernels = [row for row in rows if row.device_type == torch.autograd.DeviceType.CUDA and not row.is_user_annotation]
    times = {row.key: (row.count, row.self_device_time_total) for row in kernels}
    what = "kernels"
    if not kernels:
        what = "operations on the host"
        times = {row.key: (row.count, row.self_cpu_time_total) for row in rows}
    return table(times, what, TOP)


def table(times: dict[str, tuple[int, float]], what: str, top: int) -> list[str]:
    """name -> (calls, microseconds), as lines: the `top` most expensive with their share of all."""
    whole = sum(us for _, us in times.values()) or 1.0
    rows = sorted(times.items(), key=lambda item: -item[1][1])[:top]
    head = f"the {len(rows)} most expensive {what} of {len(times)} (calls, ms, share)"
    return [head, *(f"{count:7d}{us / 1e3:11.3f}{us / whole:8.1%}  {name[:120]}" for name, (count, us) in rows)]


def commands(own: list[str], flags: list[str], output: str, on_gpu: bool) -> list[str]:
    """nsys and ncu around this same command, ready to paste."""
    kept = [word for word in own if word not in ("--ranges_only", "--proton")]
    again = ["python", "-m", "bench", "profile", "--ranges_only", *kept]
    rest = ["--", *flags] if flags else []
    if not on_gpu:
        return ["nsys: needs a GPU to tell more than this trace does; there, this command prints the line to paste"]
    nsys = "nsys profile --trace=cuda,nvtx,osrt --capture-range=cudaProfilerApi --capture-range-end=stop"
    ncu = f"ncu --profile-from-start off --nvtx --nvtx-include {DOMAIN}@attack/ --set full --launch-count 40"
    return [
        "timeline with the stages as NVTX rows:",
        f"  {nsys} --force-overwrite=true --output={output}/nsys {shlex.join([*again, *rest])}",
        "the attack's first 40 kernels in detail (any other stage's name in its place):",
        f"  {ncu} --force-overwrite --export {output}/ncu {shlex.join([*again, '--updates', '1', *rest])}",
    ]
