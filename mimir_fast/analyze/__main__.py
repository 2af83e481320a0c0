"""python -m mimir_fast.analyze: the same as `mimir-fast analyze`."""

import sys

from mimir_fast.cli.analyze import main

sys.exit(main())
