import sys

from mimir_fast.cli import run_verb

sys.exit(run_verb("pretrain", sys.argv[1:]))
