"""python -m mimir_fast.evaluate: the same as `mimir-fast evaluate`."""

import sys

from mimir_fast.cli.evaluate import main

sys.exit(main())
