"""Ending a run from outside without losing anything."""

import signal


class StopSignals:
    """SIGTERM, SIGUSR1 and Ctrl-C ask the loop to save and end; a second Ctrl-C interrupts at once."""

    def __init__(self):
        self.received: int | None = None

    def __enter__(self) -> "StopSignals":
        self.previous = {s: signal.signal(s, self._note) for s in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)}
        return self

    def __exit__(self, *exc) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame) -> None:
        self.received = number
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)
