"""mimir-fast export: a trained model as a file for other programs."""

import sys

from mimir_fast.checkpoints.export import export
from mimir_fast.cli.errors import guarded
from mimir_fast.cli.parser import Command, parse_args
from mimir_fast.config.export import ExportConfig

COMMAND = Command("mimir-fast export", "A trained model as a file for timm or RobustBench.", ExportConfig, {})


def main(argv: list[str] | None = None) -> int:
    """Export; returns the exit status: 0 done, 1 the disk refused, 2 wrong input."""
    words = sys.argv[1:] if argv is None else argv
    return guarded(COMMAND.prog, lambda: export(parse_args(COMMAND, words)[0]), "stopped, nothing was written")


if __name__ == "__main__":
    sys.exit(main())
