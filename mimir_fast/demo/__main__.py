import sys

from mimir_fast.cli import run_verb

if __name__ == "__main__":
    sys.exit(run_verb("demo", sys.argv[1:]))
