"""mimir-fast analyze: mutual information of a checkpoint's features with images and perturbations.

Also `python -m mimir_fast.analyze`.
"""

import sys

from mimir_fast.analyze.analysis import analyze
from mimir_fast.cli.errors import guarded
from mimir_fast.cli.parser import Command, parse_args
from mimir_fast.config.analysis import AnalyzeConfig

DESCRIPTION = """Estimates of I(x;z), I(x_adv;z) and I(delta;z), z being the features of the adversarial images x_adv and
delta = x_adv - x, with 95 % intervals; the features' entropy; for classifiers the least information that their accuracy
proves (Fano).  Writes analysis.json, .svg and .png.  Exit status: 0 done, 1 failed, 2 wrong input, 130 Ctrl-C."""
COMMAND = Command("mimir-fast analyze", DESCRIPTION, AnalyzeConfig, {})


def main(argv: list[str] | None = None) -> int:
    """Analyze, print a table, write the files; returns the exit status."""
    words = sys.argv[1:] if argv is None else argv
    return guarded(COMMAND.prog, lambda: analyze(*parse_args(COMMAND, words)), "stopped, nothing was written")


if __name__ == "__main__":
    sys.exit(main())
