import sys

from mimir_fast.demo.command import main

if __name__ == "__main__":
    sys.exit(main())
