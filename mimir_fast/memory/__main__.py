import sys

from mimir_fast.cli.memory import main

sys.exit(main())
