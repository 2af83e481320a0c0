"""python -m bench kernels: every operation against its rivals, at the shapes of the recipes, checked and then timed."""

import argparse
import contextlib
import itertools
import os
import signal
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from bench.harness import CudaClock, WallClock, cache_bytes, reached
from bench.kernels import table
from bench.kernels.cases import DIRECTIONS, IMPLS, Setting, record, records
from bench.kernels.short import SHORT
from bench.kernels.suite import OPS, SIZES, Entry, entries
from bench.kernels.supervisor import CONTEXT_LOST, context_is_dead, supervise
from bench.pretend import start_under
from bench.records import RESULTS, append, heading
from bench.step.counts import pretend_gpu
from bench.training import device_name
from mimir_fast.training.distributed import World

ON_GPU = {"recipes": "imagenet_vit_b,imagenet_vit_s,cifar10_vit_s,imagenet_vit_l", "dtypes": "bf16,fp16,fp32"}
ON_CPU = {"recipes": "small", "dtypes": "fp32"}
SAME = {"impls": ",".join(IMPLS), "directions": ",".join(DIRECTIONS)}
SECONDS = {"cuda": 1.0, "cpu": 0.2}  # of timing per direction
EPILOG = f"""operations: {", ".join(OPS)}
recipes: {", ".join(SIZES)} (default: {ON_GPU["recipes"]}; on CPUs {ON_CPU["recipes"]})
dtypes: {ON_GPU["dtypes"]} (default: all; on CPUs {ON_CPU["dtypes"]}); each recipe's usual dtype comes first
impls: ours (GPUs only), eager and compiled (the reference under torch.compile), others (what else is installed)

A contender is first compared with the reference in float64 on the same inputs: what is off by more than twice eager's error
plus one rounding is reported as wrong and not timed.  Inputs rotate, so that none is in the second-level cache; contenders take
turns.  ms: median, 20th and 80th percentile.  GB/s (1e9 bytes), TFLOP/s (1e12, a multiply-add is two): what the operation must
move and compute, over the time.  peak: the share of what a plain copy and plain matrix products reach on this device, measured
at the start; dense solves are not counted.  Exit status: 0, 1 if a contender failed or is wrong, 2 wrong input, 130 Ctrl-C."""


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench kernels",
        description=__doc__.split(": ", 1)[1],
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("ops", nargs="*", metavar="op", default=[], help="operations (default: all)")
    for name in ("recipes", "dtypes", "impls", "directions"):
        add(f"--{name}", type=_words, metavar="A,B", help=SAME.get(name) and f"(default: {SAME[name]})")
    add("--seconds", type=float, help="for everything; what does not fit is named, the most important come first")
    add("--device", choices=("cuda", "cpu"), help="default: cuda where it is there; on a cpu the references are timed")
    add("--proton", action="store_true", help=f"calls below {SHORT} ms: Proton's time of the kernels alone, too (GPUs)")
    add("--pretend", metavar="WRAPPER", help="run on a pretend GPU: path of the program that provides one; no times")
    default = str(RESULTS / "kernels.jsonl")
    add("--results", default=default, metavar="FILE", help="JSON lines to append to (default: %(default)s)")
    add("--first", type=int, default=0, help=argparse.SUPPRESS)  # these two are the supervisor's words to its worker
    add("--progress", help=argparse.SUPPRESS)
    return parser


def main(arguments: list[str]) -> int:
    """Print the tables, append every record as soon as it is there; returns the exit status."""
    args = build_parser().parse_args(arguments)
    try:
        if args.pretend and not pretend_gpu():
            again = [sys.executable, "-m", "bench", "kernels", *arguments]
            return start_under(args.pretend, "h100", os.devnull, again)
        found = chosen(args)
        if args.device == "cuda" and not args.progress:
            command = [sys.executable, "-m", "bench", "kernels", *arguments]
            return supervise(command, len(found), args.seconds, lambda *how: note_crash(args, found, *how))
        return Suite(args, found).run()
    except ValueError as error:
        print(f"python -m bench kernels: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        if not args.progress:
            print(f"python -m bench kernels: stopped; what was done is in {args.results}", file=sys.stderr)
        return 130


def chosen(args: argparse.Namespace) -> list[Entry]:
    """The cases asked for; fills in the defaults.  Raises ValueError naming the wrong word."""
    if args.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device: no CUDA device here; --pretend WRAPPER runs everything on a pretend GPU")
    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    for name, default in {**(ON_GPU if args.device == "cuda" else ON_CPU), **SAME}.items():
        if getattr(args, name) is None:
            setattr(args, name, _words(default))
    for name, allowed in (("impls", IMPLS), ("directions", DIRECTIONS)):
        unknown = [word for word in getattr(args, name) if word not in allowed]
        if unknown or not getattr(args, name):
            raise ValueError(f"{name}: expected some of {', '.join(allowed)}; got {', '.join(unknown) or 'nothing'}")
    if args.proton and (args.device == "cpu" or pretend_gpu()):
        raise ValueError("proton: it times kernels on a real GPU only; leave the flag out")
    if args.seconds is not None and args.seconds <= 0:
        raise ValueError(f"seconds: expected more than 0, got {args.seconds:g}")
    return entries(args.ops or list(OPS), args.recipes, args.dtypes)


class OutOfTime(BaseException):
    """Not an error of the contender that happens to run."""


class Suite:
    """The cases one after another; every record is on disk as soon as it is there."""

    def __init__(self, args: argparse.Namespace, found: list[Entry]):
        self.args, self.found = args, found
        self.began, self.done, self.took = time.monotonic(), [], []
        self.setting = settle(args)
        self.heading = headed(self.setting.device)

    def run(self) -> int:
        print(*self.opening(), sep="\n", flush=True)
        number = self.args.first
        for number in range(self.args.first, len(self.found)):
            if self.time_is_up():
                break
            try:
                with self.alarm():
                    self.case(number)
            except OutOfTime:
                break
            if context_is_dead(self.setting.device):
                print("the GPU answers no more: the rest runs in a new process", flush=True)
                return CONTEXT_LOST
        else:
            number += 1
        print(*self.closing(self.found[number:]), sep="\n", flush=True)
        return int(any(r["status"] in ("failed", "wrong") for r in self.done))

    def case(self, number: int) -> None:
        """One case, its table and records."""
        entry, started = self.found[number], time.monotonic()
        if self.args.progress:
            Path(self.args.progress).write_text(str(number))
        recipes = ", ".join(entry.recipes)
        print(f"\n[{number + 1}/{len(self.found)}] {entry.case.label} ({recipes}){self.left(number)}", flush=True)
        print(table.head())
        for found in records(entry.case, self.setting):
            row = {**self.heading, **entry.names(), **found}
            append(row, Path(self.args.results))
            self.done.append(row)
            print(table.line(row), flush=True)
        self.took.append(time.monotonic() - started)

    def left(self, number: int) -> str:
        """How long the rest will take, from what the cases took so far."""
        if not self.took:
            return ""
        seconds = statistics.mean(self.took) * (len(self.found) - number)
        return f"; about {seconds / 60:.0f} min left" if seconds >= 60 else f"; about {seconds:.0f} s left"

    def time_is_up(self) -> bool:
        """Whether a case as long as the longest so far would go past --seconds."""
        if self.args.seconds is None or not self.took:
            return False
        return time.monotonic() - self.began + max(self.took) > self.args.seconds

    @contextlib.contextmanager
    def alarm(self) -> Iterator[None]:
        """Ends a case that is still running when --seconds are over."""
        if self.args.seconds is None:
            yield
            return

        def ring(*_) -> None:
            raise OutOfTime

        before = signal.signal(signal.SIGALRM, ring)
        signal.setitimer(signal.ITIMER_REAL, max(self.args.seconds - (time.monotonic() - self.began), 0.1))
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)

    def opening(self) -> Iterator[str]:
        device, setting = self.heading["device"], self.setting
        yield f"{len(self.found)} cases on {device}; inputs rotate past {setting.cache / 2**20:.0f} MiB of cache"
        if setting.pretend:
            yield "a pretend GPU: every contender runs once, forward and backward; nothing is compared or timed"
            return
        rates = ", ".join(f"{name} {value:.4g}" for name, value in setting.reached.items())
        yield f"measured peaks: {rates}"
        if setting.device.type == "cpu":
            yield "references on a CPU: our kernels run on GPUs only"

    def closing(self, left: list[Entry]) -> Iterator[str]:
        """Ours against the others, what was wrong, what there was no time for."""
        yield ""
        yield from table.verdicts(self.done)
        bad = [r for r in self.done if r["status"] in ("failed", "wrong")]
        for label, group in itertools.groupby(
            bad, key=lambda r: (r["op"], r["dtype"], r["recipe"], r["impl"], r["why"])
        ):
            op, dtype, recipe, impl, why = label
            directions = ", ".join(r["direction"] for r in group)
            yield f"NOT ok: {op} {dtype} {recipe}, {impl} ({directions}): {why}"
        if left:
            names = ", ".join(f"{e.case.op} {e.case.dtype} {e.recipes[0]} {e.case.part}".strip() for e in left)
            yield f"left out for lack of time, {len(left)} of {len(self.found)} cases: {names}"
        yield f"{len(self.done)} records of {len(self.took)} cases in {self.args.results}"


def headed(device: torch.device) -> dict:
    return {"kind": "kernels", **heading(device_name(World(device=device), None))}


def note_crash(args: argparse.Namespace, found: list[Entry], number: int, status: int) -> None:
    """A record for the case that a worker did not survive."""
    entry, why = found[number], f"the process ended with status {status}"
    print(f"NOT ok: {entry.case.label}: {why}; the rest runs in a new process", flush=True)
    crash = record(entry.case, "all", "all", "failed", why=why)
    append({**headed(torch.device(args.device)), **entry.names(), **crash}, Path(args.results))


def settle(args: argparse.Namespace) -> Setting:
    """Where and how; measures the device's peaks."""
    device, pretend = torch.device(args.device), pretend_gpu() is not None
    if pretend:
        torch.backends.cuda.enable_cudnn_sdp(False)  # cuDNN is not there
    return Setting(
        device=device,
        clock=CudaClock() if device.type == "cuda" else WallClock(),
        reached={} if pretend else reached(device),
        cache=cache_bytes(device),
        seconds=SECONDS[device.type],
        impls=tuple(args.impls),
        directions=tuple(args.directions),
        pretend=pretend,
        proton=args.proton,
    )


def _words(text: str) -> list[str]:
    return [word for word in text.split(",") if word]
