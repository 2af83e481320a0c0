"""python -m bench.simulated_gpu: run a program on a simulated GPU whose kernels do nothing, and log its CUDA calls."""

import argparse
import os
import sys

from bench import simulated_gpu
from bench.peaks import PEAKS
from bench.simulated_gpu.build import missing_calls, unsuitable


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench.simulated_gpu", description=(__doc__ or "").partition(": ")[2]
    )
    add = parser.add_argument
    add("--gpu", choices=list(PEAKS), default="h100", help="which GPU the program finds (default: %(default)s)")
    add("--memory_mib", type=int, metavar="N", help="its memory [MiB] (default: the GPU's)")
    add("--log", default=os.devnull, metavar="FILE", help="calls are appended to it (default: none are kept)")
    add("--any_torch", action="store_true", help="whatever the version of torch")
    add("--missing", action="store_true", help="list the calls of this torch that are not simulated, and end")
    add("program", nargs=argparse.REMAINDER, metavar="PROGRAM ARG...", help="what to run, e.g. python script.py")
    return parser


def main(arguments: list[str]) -> int:
    """Becomes the program; returns only after --missing, or with status 2 and one line if it cannot run."""
    parser = build_parser()
    args = parser.parse_args(arguments)
    try:
        if args.missing:
            print(*missing_calls(), sep="\n")
            return 0
        if not args.program:
            raise ValueError("program: expected a command to run, e.g. python script.py")
        if not args.any_torch and (reason := unsuitable()):
            raise ValueError(reason)
        environment = simulated_gpu.environment(args.gpu, args.log, args.memory_mib)
        os.execvpe(args.program[0], args.program, environment)
    except (ValueError, OSError) as error:
        print(f"python -m bench.simulated_gpu: error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
