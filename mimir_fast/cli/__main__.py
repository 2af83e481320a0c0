import sys

from mimir_fast.cli import main

sys.exit(main())
