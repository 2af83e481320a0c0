"""python -m bench VERB: how fast it is, and how close to the limit.

kernels   every operation against its rivals at the shapes of the recipes, checked, then timed
compile   every kernel compiled for A100 and H100, its machine code read (no GPU needed)
step      one step of pre-training or fine-tuning priced against a GPU's limits, and measured where the GPU is there
pairs     images per second of the step against the textbook step, in pairs in one process
losses    the training loss in fp32, over seeds, and with the 16-bit options, on real images
train     images per second of the real training loop from a folder of images, and the share of every stage
profile   a trace of some updates, their ten most expensive kernels, and commands for NVIDIA's profilers
compare   what got faster or slower between two files of records, beyond the noise
report    the tables and plots of README.md and docs/performance.md, drawn from bench/results
gpu       tests, step, training loop and profile in one go on one GPU, with a summary: what to run there first
"""

import importlib
import sys

VERBS = {"kernels": "bench.kernels.command"}
VERBS |= {"compile": "bench.compile", "step": "bench.step.command", "pairs": "bench.pairs", "losses": "bench.losses"}
VERBS |= {"train": "bench.train", "profile": "bench.profile", "gpu": "bench.gpu.command"}
VERBS |= {"compare": "bench.compare", "report": "bench.report.command"}


def main(arguments: list[str]) -> int:
    if not arguments or arguments[0] not in VERBS:
        print(f"usage: python -m bench {{{','.join(VERBS)}}} ...\n{__doc__.split(chr(10), 1)[1]}", file=sys.stderr)
        return 2
    return importlib.import_module(VERBS[arguments[0]]).main(arguments[1:])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
