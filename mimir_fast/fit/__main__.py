import sys

from mimir_fast.fit.command import main

sys.exit(main())
