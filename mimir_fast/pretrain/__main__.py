import sys

from mimir_fast.cli.pretrain import main

sys.exit(main())
