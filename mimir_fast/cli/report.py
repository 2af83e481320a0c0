"""mimir-fast report RUN_DIR: one self-contained HTML page of a run."""

import argparse
import sys

from mimir_fast.cli.errors import guarded
from mimir_fast.config.fields import home_path
from mimir_fast.report.run_page import write_report


def main(argv: list[str] | None = None) -> int:
    """Draw; returns the exit status: 0 done, 1 the disk refused, 2 the folder holds no run, 130 Ctrl-C."""
    parser = argparse.ArgumentParser(
        prog="mimir-fast report",
        description="Draw a run: losses, accuracies, learning rate, throughput, and a pre-training's reconstructions.",
    )
    parser.add_argument(
        "run_dir", metavar="RUN_DIR", type=home_path, help="the --output_dir of a run, finished or going on"
    )
    args = parser.parse_args(argv)
    return guarded("mimir-fast report", lambda: report(args.run_dir), "stopped, nothing was written")


def report(run_dir: str) -> int:
    """Write the page and say where it is."""
    print(f"report: {write_report(run_dir)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
