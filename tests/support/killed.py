"""`python -m tests.support.killed ...`: mimir-fast pretrain; TEST_KILL="RANK UPDATE" kills a process before an update."""

import os
import signal
import sys

from mimir_fast.cli.pretrain import main
from mimir_fast.training.engine import Engine

if __name__ == "__main__":
    update = Engine.update

    def killed(self, number: int = 1):
        if os.environ["TEST_KILL"] == f"{os.environ['RANK']} {number}":
            os.kill(os.getpid(), signal.SIGKILL)
        return update(self, number)

    Engine.update = killed
    sys.exit(main(sys.argv[1:]))
