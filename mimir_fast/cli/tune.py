"""mimir-fast tune: measure ahead which implementations of attention and MLP are the fastest on this machine.

Takes every flag of `mimir-fast pretrain`, or with `--task finetune` of `mimir-fast finetune`: use the command line of the run.
"""

import sys
from pathlib import Path

import torch

from mimir_fast.cli.errors import guarded
from mimir_fast.cli.parser import build_parser, canonical, configuration
from mimir_fast.cli.tasks import add_task, command_of, commands_for
from mimir_fast.config.fields import home_path
from mimir_fast.config.machine import limit_threads, prepare_machine
from mimir_fast.config.resolve import WORDS, Run, resolve
from mimir_fast.tuning import remembered
from mimir_fast.tuning.decisions import environment_of, trials_of
from mimir_fast.tuning.records import AGAIN
from mimir_fast.tuning.remembered import UnusableError, key
from mimir_fast.tuning.table import measured_peaks, table
from mimir_fast.tuning.timers import stopwatch_for

PROG = "mimir-fast tune"
DESCRIPTION = """Measure every implementation of a training's attention and MLP on this machine, at the sizes and dtype of
these flags, print a table, and remember it, so that the training begins at once.  Exit status: 0 done, 2 wrong input."""
COMMANDS = commands_for(PROG, DESCRIPTION)
# Seconds after which no further candidate is tried: ten times what a run takes for it at its start.
LIMIT = 600.0


def main(argv: list[str] | None = None) -> int:
    """Measure and print; returns the exit status: 0 done, 2 wrong input, 130 Ctrl-C."""
    words = sys.argv[1:] if argv is None else argv
    prepare_machine()
    limit_threads()
    return guarded(PROG, lambda: report(words), "stopped, nothing was remembered")


def report(words: list[str]) -> int:
    """Measure and print; returns the exit status.  Raises ValueError for wrong input, OSError where a file is refused."""
    run, source, target = parse_tune_args(words)
    if not run.compute.measured:
        raise ValueError(
            "tune: with these flags nothing is measured: that needs CUDA, 16 bits and --kernels triton, or a CPU with "
            "--compile, and --attention or --mlp auto"
        )
    device = torch.device(run.device)
    environment = environment_of(device, run)
    if source:
        remembered.remember(environment, imported(source, environment), print)
    trials = trials_of(run, device, print, run.compute.tune == AGAIN, LIMIT, whole=True)
    peaks = measured_peaks(stopwatch_for(device), device, WORDS[run.compute.dtype])
    print(f"{environment['device']}: product {peaks.flops / 1e12:.4g} TFLOP/s, copy {peaks.bandwidth / 1e9:.4g} GB/s")
    for problem, found in trials.items():
        print(*table(problem, found, peaks), sep="\n")
    if target:
        remembered.write(Path(target), environment, {key(p): found for p, found in trials.items()}, "export")
        print(f"export: {target}: {len(trials)} operations")
    return 0


def parse_tune_args(argv: list[str]) -> tuple[Run, str, str]:
    """Command-line words -> the run, the file to import, the file to export to ("": none).

    Exits with status 2 and one line on a wrong flag (argparse); raises ValueError on a wrong value.
    """
    command = command_of(argv, COMMANDS)
    parser = build_parser(command)
    add_task(parser)
    group = parser.add_argument_group("Carrying measurements to other machines of the same kind")
    group.add_argument("--export", metavar="FILE", type=home_path, help="write what these flags need")
    group.add_argument("--import", metavar="FILE", type=home_path, help="remember what another machine exported")
    given = vars(parser.parse_args([canonical(word, command) for word in argv]))
    del given["task"]
    files = given.pop("import", ""), given.pop("export", "")
    return resolve(*configuration(command, given)), *files


def imported(source: str, environment: remembered.Environment) -> remembered.Measured:
    """The measurements of a file.  Raises ValueError if they are not of this environment."""
    try:
        return remembered.read(Path(source), environment)
    except (FileNotFoundError, UnusableError) as error:
        raise ValueError(f"import: {source}: {error}") from error


if __name__ == "__main__":
    sys.exit(main())
