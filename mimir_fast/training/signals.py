"""Signals that stop a run: it saves a resume point first."""

import signal
import threading
from types import FrameType


class StopSignals:
    """SIGTERM, SIGUSR1, SIGHUP (a closed terminal) and Ctrl-C ask the loop to save and end; a second Ctrl-C interrupts at once.

    received   the signal that came, or None
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self.previous: dict = {}

    def __enter__(self) -> "StopSignals":
        # Python lets the main thread alone handle signals; a training started in another one runs without.
        if threading.current_thread() is threading.main_thread():
            handled = [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT]
            # Ignored under nohup: the run shall outlive its terminal.
            if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
                handled.append(signal.SIGHUP)
            self.previous = {s: signal.signal(s, self._note) for s in handled}
        return self

    def __exit__(self, *exc) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = number
        # The second Ctrl-C raises KeyboardInterrupt at once: a person may not want to wait for the save.
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)
