"""python -m bench kernels: every operation against its rivals, at the shapes of the recipes, checked and then timed."""

import argparse
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

from bench import records
from bench.kernels.cases import ON_CPU, ON_GPU, OPS, SIZES, entries
from bench.simulated_gpu import marker

EPILOG = f"""operations: {", ".join(OPS)}
recipes: {", ".join(SIZES)} (default: {",".join(ON_GPU[0])}; on CPUs {ON_CPU[0][0]})
dtypes: {", ".join(ON_GPU[1])} (default: all; on CPUs {ON_CPU[1][0]}); each recipe's usual dtype comes first
implementations: ours (GPUs only), eager and compiled (the reference under torch.compile), others (what else is installed)

An implementation is first compared with the reference in float64 on the same inputs: what is off by more than twice eager's
error plus one rounding is wrong and not timed.  pytest-benchmark's tables, one per case, compare whole calls; on a GPU the
records have the device's time as well (ms, by triton.testing) and the data sheet's bound.  Every record is written as soon as
it is there; after a kernel that kills the GPU's context it ends.
pytest's words follow --, for instance -- -k "ours and forward", or -- --benchmark-autosave and later -- --benchmark-compare.
Exit status: pytest's; 0 if all is right, 1 if an implementation failed or is wrong, 2 wrong input."""


def build_parser() -> argparse.ArgumentParser:
    parser = records.parser("kernels", __doc__, EPILOG, "kernels.jsonl")
    add = parser.add_argument
    add("ops", nargs="*", metavar="op", default=[], help="operations (default: all)")
    add("--recipes", type=records.words, metavar="A,B", help="whose shapes")
    add("--dtypes", type=records.words, metavar="A,B", help="storage of images and activations")
    add("--seconds", type=float, help="for everything; the most important measurements come first")
    return parser


def run(args: argparse.Namespace, flags: list[str]) -> int:
    """Start pytest; returns its exit status.  Raises ValueError naming what is wrong or missing."""
    if not find_spec("pytest_benchmark"):
        raise ValueError("kernels: pytest-benchmark is not installed; pip install 'mimir-fast[dev]'")
    if args.seconds is not None and args.seconds <= 0:
        raise ValueError(f"seconds: expected more than 0, got {args.seconds:g}")
    entries(args.ops or list(OPS), *((a or d) for a, d in zip((args.recipes, args.dtypes), ON_GPU)))
    lists = {"ops": args.ops, "recipes": args.recipes, "dtypes": args.dtypes}
    words = [f"--{name}={','.join(value)}" for name, value in lists.items() if value]
    words += [f"--results={Path(args.results).resolve()}", *([f"--seconds={args.seconds}"] if args.seconds else [])]
    words += ["--benchmark-disable"] if marker() else ["--benchmark-only", "--benchmark-columns=median,iqr,rounds"]
    words += ["--timeout=0"] if find_spec("pytest_timeout") else []
    command = [sys.executable, "-m", "pytest", str(Path(__file__).parent), "-p", "no:cacheprovider", "--tb=short"]
    return subprocess.run([*command, *words, *flags], cwd=records.ROOT, check=False).returncode
