"""mimir-fast report RUN_DIR: one self-contained HTML page of a run."""

import argparse
import sys

from mimir_fast.report.run_page import ReportError, write_report


def main(argv: list[str] | None = None) -> int:
    """`mimir-fast report RUN_DIR`: returns 0, or 1 with one line when the folder holds no run."""
    parser = argparse.ArgumentParser(
        prog="mimir-fast report",
        description="Draw a run: losses, accuracies, learning rate, throughput, and a pre-training's reconstructions.",
    )
    parser.add_argument("run_dir", metavar="RUN_DIR", help="the --output_dir of a run, finished or going on")
    args = parser.parse_args(argv)
    try:
        path = write_report(args.run_dir)
    except (ReportError, OSError) as error:
        print(f"mimir-fast report: error: {error}", file=sys.stderr)
        return 1
    print(f"report: {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
