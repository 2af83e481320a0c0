"""How far an analysis is and how long it will still take."""

import sys
import time

SECONDS_BETWEEN_LINES = 10


class Progress:
    """Steps of several phases, each as long as its earlier ones; a line on stderr now and then, rewritten on a terminal.

    phases: {name: steps for one model}; models: how many there are.
    """

    def __init__(self, phases: dict[str, int], models: int):
        self.left = {name: steps * models for name, steps in phases.items()}
        self.spent = dict.fromkeys(phases, 0.0)
        self.done = dict.fromkeys(phases, 0)
        self.last = self.told = time.perf_counter()
        self.terminal = sys.stderr.isatty()

    def begin(self) -> None:
        """What follows is a step; time since the last one counts for nothing."""
        self.last = time.perf_counter()

    def step(self, name: str, what: str) -> None:
        """After a step of a phase of the model called `what`."""
        now = time.perf_counter()
        self.spent[name] += now - self.last
        self.last = now
        self.done[name] += 1
        self.left[name] -= 1
        if now - self.told >= (0.2 if self.terminal else SECONDS_BETWEEN_LINES):
            self.told = now
            print(f"{what}: {name}, {self.remaining()} left", end="   \r" if self.terminal else "\n", file=sys.stderr)

    def remaining(self) -> str:
        """Time that the steps still to come will take; at least, where a phase has not been seen yet."""
        seconds = sum(self.left[name] * self.spent[name] / self.done[name] for name in self.left if self.done[name])
        unseen = any(self.left[name] and not self.done[name] for name in self.left)
        minutes, seconds = divmod(round(seconds), 60)
        return f"{'at least ' * unseen}{minutes}:{seconds:02d} min"
