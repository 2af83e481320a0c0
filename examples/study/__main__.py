"""python -m examples.study: run the study of docs/experiments.md, or what is left of it.

Several processes share the work; stopped or killed, the same command goes on where it was.
"""

import argparse
import contextlib
import ctypes
import signal
import subprocess
import sys
from pathlib import Path

import torch

from examples.study.images import prepare
from examples.study.plan import STUDIES, Candidate, Study
from examples.study.results import holding
from examples.study.run import Worker
from mimir_fast.cli.errors import guarded
from mimir_fast.config.fields import home_path

PROG = "python -m examples.study"
PR_SET_PDEATHSIG = 1


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=PROG, description=__doc__)
    add = parser.add_argument
    add("--study", choices=STUDIES, default="cifar10", help="what is run (default: %(default)s)")
    add("--data_root", default="data", type=home_path, help="folder that holds the data set (default: %(default)s)")
    add("--output_dir", default="runs/study", type=home_path, help="folder of everything (default: %(default)s)")
    add("--processes", type=int, default=1, help="processes, of one thread each (default: %(default)s)")
    add("--recipe", default="", help="name of a candidate; default: the one that the search finds")
    add("--only", nargs="+", default=[], metavar="PATTERN", help="jobs ARM/SEED/WHAT, such as 'scratch/0/*'")
    return parser


def study(args: argparse.Namespace, words: list[str]) -> int:
    """Run the study; returns the exit status.  Raises ValueError for wrong input."""
    plan, root = STUDIES[args.study], Path(args.output_dir)
    recipe = candidate(plan, args.recipe)
    # Several threads would wait for each other more than they compute, at these sizes.
    torch.set_num_threads(1)
    with holding(root / "images.lock", wait=True):
        prepare(str(plan.data["dataset"]), args.data_root, root / "data", plan.per_class)
    # Of two equal flags the last one counts.
    command = [sys.executable, "-m", "examples.study", *words, "--processes", "1"]
    others = [subprocess.Popen(command, preexec_fn=die_with_parent) for _ in range(args.processes - 1)]
    status = Worker(plan, root, recipe, tuple(args.only), say).run()
    if status:
        for process in others:
            process.terminate()
    ends = [process.wait() for process in others]
    return status or next(filter(None, ends), 0)


def die_with_parent() -> None:
    """Have Linux end this process when its parent ends: after a kill the same command starts as many as before."""
    with contextlib.suppress(AttributeError):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def say(line: str) -> None:
    print(line, flush=True)


def candidate(plan: Study, name: str) -> Candidate | None:
    """The candidate of a name, None for an empty one.  Raises ValueError if there is none."""
    found = [candidate for candidate in plan.candidates if candidate.name == name]
    if name and not found:
        known = "; ".join(candidate.name for candidate in plan.candidates)
        raise ValueError(f"recipe: got {name!r}, expected one of: {known}")
    return found[0] if found else None


def main(argv: list[str] | None = None) -> int:
    """Run what is left; returns the exit status: 0 done, else that of the job that ended early."""
    words = sys.argv[1:] if argv is None else argv
    args = build_parser().parse_args(words)
    return guarded(PROG, lambda: study(args, words), "stopped; the same command goes on from there")


if __name__ == "__main__":
    sys.exit(main())
