"""python -m bench profile: a trace of some updates, the time of their stages, and their most expensive kernels."""

import argparse
import sys
from pathlib import Path
from typing import Any

import torch

from bench import loop, records
from bench.simulated_gpu import marker
from mimir_fast.training import stages

EPILOG = f"""Trainer flags may follow --.  Stages (mimir_fast/training/stages.py):
{stages.__doc__.split(chr(10), 2)[2].strip()}
Backward passes run on the main thread here, so that their kernels fall into their stages.  The trace opens in
https://ui.perfetto.dev.  Times under a profiler are longer than without: python -m bench train measures.

NVIDIA's profilers want the same command with --ranges_only behind their own words; a timeline with the stages as rows:
  nsys profile --trace=cuda,nvtx,osrt --capture-range=cudaProfilerApi --capture-range-end=stop -o runs/profile/nsys \\
      python -m bench profile --ranges_only
the attack's first 40 kernels in detail (any other stage's name in its place; the slash: a range that is pushed and popped):
  ncu --profile-from-start off --nvtx --nvtx-include attack/ --set full --launch-count 40 --export runs/profile/ncu \\
      python -m bench profile --ranges_only --updates 1"""


class NvtxRanges:
    """For nsys and ncu: ranges, cudaProfilerStart and cudaProfilerStop.  Raises ValueError without a GPU."""

    def __init__(self):
        if not torch.cuda.is_available():
            raise ValueError("ranges_only: no CUDA device here; NVIDIA's profilers look at GPUs only")
        self.opened, self.start, self.stop = torch.cuda.nvtx.range, torch.cuda.profiler.start, torch.cuda.profiler.stop

    def told(self) -> str:
        return "NVTX ranges only, no trace"


class TorchProfiler:
    """torch.profiler with a range for every stage, the trace in a file."""

    def __init__(self, trace: Path):
        self.trace, activities = trace, [torch.profiler.ProfilerActivity.CPU]
        self.on_gpu = torch.cuda.is_available() and not marker()
        if self.on_gpu:
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        self.profile, self.opened = torch.profiler.profile(activities=activities), torch.profiler.record_function
        self.start, self.stop = self.profile.start, self.profile.stop

    def told(self) -> str:
        """Writes the trace; the stages' time, and the table of the ten most expensive kernels, on a CPU of the operations."""
        self.trace.parent.mkdir(parents=True, exist_ok=True)
        self.profile.export_chrome_trace(str(self.trace))
        rows, where = self.profile.key_averages(), "cuda" if self.on_gpu else "cpu"
        table = rows.table(sort_by=f"self_{where}_time_total", row_limit=10, max_name_column_width=80)
        attribute = "device_time_total" if self.on_gpu else "cpu_time_total"
        times = {name: sum(getattr(row, attribute) for row in rows if row.key == name) for name in stages.STAGES}
        shown = [f"{name:<10}{us / 1e3:12.3f} ms" for name, us in times.items()]
        note = ["a simulated GPU: no kernel runs and none has a time; these are the host's"] if marker() else []
        return "\n".join([*note, "stages, what lies inside of them included", *shown, table, f"trace: {self.trace}"])


def build_parser() -> argparse.ArgumentParser:
    parser = records.parser("profile", __doc__, EPILOG)
    loop.add_arguments(parser, updates=3, warmup=5)
    add = parser.add_argument
    add("--output", default="runs/profile", metavar="FOLDER", help="where the trace goes (default: %(default)s)")
    add("--ranges_only", action="store_true", help="NVTX ranges for NVIDIA's profilers in place of a trace (GPUs)")
    return parser


def run(args: argparse.Namespace, flags: list[str]) -> int:
    """Profile and print; returns the exit status: 0, or 1 if the training ended early."""
    profiler: Any = NvtxRanges() if args.ranges_only else TorchProfiler(Path(args.output) / "trace.json.gz")
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
    print(f"{args.updates} updates after {args.warmup} of {args.model}, batch {args.batch}; {name}\n{profiler.told()}")
    return 0
