import sys

from mimir_fast.finetune.command import main

sys.exit(main())
