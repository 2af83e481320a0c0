"""python -m mimir_fast.evaluate: the same as `mimir-fast evaluate`."""

import sys

from mimir_fast.cli import run_verb

sys.exit(run_verb("evaluate", sys.argv[1:]))
