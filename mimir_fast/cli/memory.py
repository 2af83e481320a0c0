"""mimir-fast memory: predicted peak GPU memory of a training and the largest batch that fits; needs no GPU.

Also `python -m mimir_fast.memory`.  Takes every flag of `mimir-fast pretrain`, or with `--task finetune` of `mimir-fast
finetune`: try a command line as it stands.
"""

import sys

from mimir_fast.cli.errors import guarded
from mimir_fast.cli.parser import build_parser, canonical, configuration
from mimir_fast.cli.tasks import add_task, command_of, commands_for
from mimir_fast.config.resolve import Run
from mimir_fast.memory import capacity
from mimir_fast.memory.capacity import GPUS, Gpu, needed, on_cuda
from mimir_fast.memory.prediction import predict

PROG = "mimir-fast memory"
DESCRIPTION = """Peak GPU memory [GiB, 2^30 bytes] of one process's training step, and the largest batch [images] that fits.
Needs no GPU, reads no data, takes seconds when eager and a minute or two when compiled.  Exit status: 0 the batch fits a GPU,
1 it does not, 2 wrong input."""
COMMANDS = commands_for(PROG, DESCRIPTION)


def main(argv: list[str] | None = None) -> int:
    """Predict and print; returns the exit status: 0 the batch fits, 1 it does not, 2 wrong input, 130 Ctrl-C."""
    words = sys.argv[1:] if argv is None else argv
    return guarded(PROG, lambda: report(words), "stopped, nothing was predicted")


def report(words: list[str]) -> int:
    """Predict and print; returns 0 if the batch fits, 1 if not.  Raises ValueError for wrong input."""
    run, gpus = parse_memory_args(words)
    prediction = predict(run)
    for line in capacity.report(run, prediction, gpus):
        print(line)
    batch = run.config.optim.batch_size
    return 0 if any(needed(prediction, gpu, batch) <= gpu.memory for gpu in gpus.values()) else 1


def parse_memory_args(argv: list[str]) -> tuple[Run, dict[str, Gpu]]:
    """Command-line words -> the run as it would be on CUDA, and the GPUs it is held against.

    Exits with status 2 and one line on a wrong flag (argparse); raises ValueError on a wrong value.
    """
    command = command_of(argv, COMMANDS)
    parser = build_parser(command)
    add_task(parser)
    group = parser.add_argument_group("What it must fit (default: every GPU known by name)")
    group.add_argument("--gpu", choices=list(GPUS), help="a GPU by name and memory")
    group.add_argument("--memory_gib", type=float, metavar="FLOAT", help="any other GPU's memory [GiB]")
    given = vars(parser.parse_args([canonical(word, command) for word in argv]))
    del given["task"]
    name, memory = given.pop("gpu", None), given.pop("memory_gib", None)
    if name and memory is not None:
        raise ValueError(f"memory_gib: got {memory:g} beside --gpu {name}; pass one of the two")
    if memory is not None and not memory > 0:
        raise ValueError(f"memory_gib: got {memory:g}, expected more than 0")
    run = on_cuda(*configuration(command, given))
    if memory is not None:
        return run, {f"{memory:g} GiB": Gpu(memory, 32)}
    return run, {name: GPUS[name]} if name else GPUS


if __name__ == "__main__":
    sys.exit(main())
