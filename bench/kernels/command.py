"""python -m bench kernels: every operation against its rivals, at the shapes of the recipes, checked and then timed."""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path

from bench import records
from bench.kernels.suite import ON_CPU, ON_GPU, OPS, SIZES, entries
from bench.simulated_gpu import marker

TESTS = Path(__file__).parent / "test_speed.py"
FINISHED = range(6)  # pytest's own exit statuses
EPILOG = f"""operations: {", ".join(OPS)}
recipes: {", ".join(SIZES)} (default: {",".join(ON_GPU[0])}; on CPUs {ON_CPU[0][0]})
dtypes: {", ".join(ON_GPU[1])} (default: all; on CPUs {ON_CPU[1][0]}); each recipe's usual dtype comes first
implementations: ours (GPUs only), eager and compiled (the reference under torch.compile), others (what else is installed)

An implementation is first compared with the reference in float64 on the same inputs: what is off by more than twice eager's
error plus one rounding is wrong and not timed.  On a GPU triton.testing measures the device's time; pytest-benchmark's tables
show the whole call.  Every record is written as soon as it is there; a crash costs one measurement.
pytest's words follow --, for instance -- -k "ours and forward", or -- --benchmark-autosave and later -- --benchmark-compare.
Exit status: 0, 1 if an implementation failed or is wrong, 2 wrong input."""


def build_parser() -> argparse.ArgumentParser:
    parser = records.parser("kernels", __doc__, EPILOG, "kernels.jsonl")
    add = parser.add_argument
    add("ops", nargs="*", metavar="op", default=[], help="operations (default: all)")
    add("--recipes", type=records.words, metavar="A,B", help="whose shapes")
    add("--dtypes", type=records.words, metavar="A,B", help="storage of images and activations")
    add("--seconds", type=float, help="for everything; the most important measurements come first")
    return parser


def run(args: argparse.Namespace, flags: list[str]) -> int:
    """Start pytest, and say how ours did; returns the exit status.  Raises ValueError naming what is wrong or missing."""
    if not find_spec("pytest_benchmark"):
        raise ValueError("kernels: pytest-benchmark is not installed; pip install 'mimir-fast[dev]'")
    if args.seconds is not None and args.seconds <= 0:
        raise ValueError(f"seconds: expected more than 0, got {args.seconds:g}")
    entries(args.ops or list(OPS), *((a or d) for a, d in zip((args.recipes, args.dtypes), ON_GPU)))
    lists = {"ops": args.ops, "recipes": args.recipes, "dtypes": args.dtypes}
    words = [f"--{name}={','.join(value)}" for name, value in lists.items() if value]
    results = Path(args.results).resolve()
    before = len(results.read_text().splitlines()) if results.exists() else 0
    timing = ["--benchmark-disable"] if marker() else ["--benchmark-only", "--benchmark-columns=median,iqr,rounds"]
    command = [sys.executable, "-m", "pytest", str(TESTS), *timing, "-p", "no:cacheprovider", "--tb=short"]
    command += ["--timeout=0"] if find_spec("pytest_timeout") else []
    status = supervise([*command, f"--results={results}", *words, *flags], args.seconds, note_crash(results))
    found = [json.loads(line) for line in results.read_text().splitlines()[before:]] if results.exists() else []
    print(*verdicts(found), f"{len(found)} records in {results}", sep="\n")
    return status


def supervise(command: list[str], seconds: float | None, crashed: Callable[[int, int], object]) -> int:
    """Run the measurements, the rest in a new process as long as one does not finish; returns the worst exit status.

    crashed(number, status) is told which measurement a process did not survive.  What there is no time for is left out.
    """
    ends, first, worst = None if seconds is None else time.monotonic() + seconds, 0, 0
    with tempfile.TemporaryDirectory() as folder:
        progress = Path(folder) / "number"
        while True:
            own = [f"--first={first}", f"--progress={progress}"]
            left = None if ends is None else max(ends - time.monotonic(), 0.1)
            try:
                status = subprocess.run([*command, *own], cwd=records.ROOT, check=False, timeout=left).returncode
            except subprocess.TimeoutExpired:
                print(f"out of time in measurement {progress.read_text() if progress.exists() else first}", flush=True)
                return worst
            if status in FINISHED:  # 5: pytest found nothing left to do
                return worst if status == 5 and first else max(worst, status)
            if not progress.exists():  # it did not get as far as the first measurement
                return 1
            number, worst = int(progress.read_text()), 1
            progress.unlink()
            crashed(number, status)
            first = number + 1


def note_crash(results: Path) -> Callable[[int, int], None]:
    """Leaves a record of a measurement that its process did not survive."""

    def note(number: int, status: int) -> None:
        why = f"the process ended with status {status} in measurement {number}; the rest runs in a new one"
        print(why, flush=True)
        records.append({"kind": "crash", **records.heading("GPU"), "why": why}, results)

    return note


def verdicts(found: list[dict]) -> Iterator[str]:
    """Ours against the fastest of the others, per case and direction, where both have a time; what was wrong."""
    groups: dict[str, dict[str, dict]] = {}
    for r in found:
        if r.get("status") == "ok":
            shape = " ".join(f"{name}{size}" for name, size in r["config"].items())
            groups.setdefault(f"{r['op']} {r['dtype']} {shape} {r['direction']}", {})[r["impl"]] = r
    for label, times in groups.items():
        ours = times.pop("ours", None)
        if ours and times:
            best = min(times.values(), key=lambda r: r["ms"])
            share = f", {ours['bound ms'] / ours['ms']:.0%} of the data sheet's peak" if ours.get("bound ms") else ""
            yield (
                f"{label}: {ours['ms']:.4f} ms{share}; {best['ms'] / ours['ms']:.2f} x the speed of {best['impl']} "
                f"({best['ms']:.4f} ms)"
            )
    for r in found:
        if r.get("status") in ("failed", "wrong"):
            yield f"NOT ok: {r['op']} {r['dtype']} {r['recipe']}, {r['impl']} ({r['direction']}): {r['why']}"
