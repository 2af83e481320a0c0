"""python -m bench VERB: how fast it is, and how close to the limit.

kernels   every operation against its rivals at the shapes of the recipes, checked, then timed
compile   every kernel compiled for A100 and H100, its machine code read (no GPU needed)
step      one step of pre-training or fine-tuning priced against a GPU's limits, and measured where the GPU is there
train     images per second of the real training loop from a folder of images, MFU, memory, the wait for data
data      a cache's reader against a memory copy, torch's DataLoader and JPEG files, in processor time (no GPU needed)
profile   a trace of some updates, the time of their stages, their ten most expensive kernels
capture   updates launched as a CUDA graph against the same ones uncaptured, bit for bit
gpu       capture, tests, kernels, step, data, training loop and profile in one go on one GPU: what to run there first

--simulate h100 (or h200, a100) runs a verb on a simulated GPU (bench/simulated_gpu): calls and memory are exact, times do not
exist.
"""

import importlib
import subprocess
import sys
import tempfile
from pathlib import Path

from bench import simulated_gpu
from bench.simulated_gpu.build import unsuitable

VERBS = {"kernels": "bench.kernels.command", "step": "bench.step.command"}
VERBS |= {name: f"bench.{name}" for name in ("compile", "train", "data", "profile", "capture", "gpu")}


def main(arguments: list[str]) -> int:
    """Each verb's module has build_parser() and run(args, flags of the trainer, or words of pytest) -> exit status.

    Returns that status, or 2 with one line on wrong input.
    """
    if not arguments or arguments[0] not in VERBS:
        print(
            f"usage: python -m bench {{{','.join(VERBS)}}} ...\n{(__doc__ or '').partition(chr(10))[2]}",
            file=sys.stderr,
        )
        return 2
    verb, *words = arguments
    where = words.index("--") if "--" in words else len(words)
    module = importlib.import_module(VERBS[verb])
    args, flags = module.build_parser().parse_known_args(words[:where])
    flags += words[where + 1 :]
    try:
        if getattr(args, "simulate", None) and not simulated_gpu.marker():
            return start_again(args.simulate, arguments)
        return module.run(args, flags)
    except ValueError as error:
        print(f"python -m bench {verb}: error: {error}", file=sys.stderr)
        return 2


def start_again(gpu: str, arguments: list[str]) -> int:
    """This same command in a process that finds the simulated GPU.  Raises ValueError if that cannot be had here."""
    if reason := unsuitable():
        raise ValueError(reason)
    with tempfile.TemporaryDirectory() as folder:
        environment = simulated_gpu.environment(gpu, Path(folder) / "calls.log")
        return subprocess.run([sys.executable, "-m", "bench", *arguments], env=environment, check=False).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
