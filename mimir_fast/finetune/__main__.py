import sys

from mimir_fast.cli import run_verb

sys.exit(run_verb("finetune", sys.argv[1:]))
