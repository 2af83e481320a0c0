import sys

from mimir_fast.cli.finetune import main

sys.exit(main())
