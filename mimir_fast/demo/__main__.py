import sys

from mimir_fast.cli.demo import main

if __name__ == "__main__":
    sys.exit(main())
