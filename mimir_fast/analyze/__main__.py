"""python -m mimir_fast.analyze: the same as `mimir-fast analyze`."""

import sys

from mimir_fast.cli import run_verb

sys.exit(run_verb("analyze", sys.argv[1:]))
