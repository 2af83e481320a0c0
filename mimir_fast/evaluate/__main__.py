"""python -m mimir_fast.evaluate: the same as `mimir-fast evaluate`."""

import sys

from mimir_fast.evaluate.command import main

sys.exit(main())
