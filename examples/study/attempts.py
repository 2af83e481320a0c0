"""CPU time of a job over all attempts, those that were killed included."""

import datetime
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mimir_fast.checkpoints.atomic import write_text_atomically

# Seconds between two writes: what a kill can hide of the time.
BEAT = 20.0


class Attempts:
    """A file beside a job's results: when its first attempt began, and the CPU seconds of all attempts so far."""

    def __init__(self, path: Path):
        self.path = path
        now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
        state = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        self.began, self.seconds = state.get("began", now), state.get("cpu_seconds", 0.0)

    @contextmanager
    def counted(self) -> Iterator[None]:
        """Context whose CPU time in this process is added."""
        before, start, ended = self.seconds, time.process_time(), threading.Event()

        def write() -> None:
            self.seconds = before + time.process_time() - start
            write_text_atomically(self.path, json.dumps({"began": self.began, "cpu_seconds": self.seconds}))

        def beat() -> None:
            while not ended.wait(BEAT):
                write()

        # Before anything else: the folder is made, and the beginning is known.
        write()
        thread = threading.Thread(target=beat, daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()
            write()
