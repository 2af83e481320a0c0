"""Time left of an analysis, from the time that each of its phases has taken so far."""

import time

from tqdm import tqdm

from mimir_fast.evaluate.progress import Bar


class TimeLeft:
    """Counts the steps of several phases; a step is expected to take as long as the earlier ones of its phase.

    phases   name -> steps for one model
    models   how many models there are
    """

    def __init__(self, phases: dict[str, int], models: int, bar: Bar):
        self.left = {name: steps * models for name, steps in phases.items()}
        self.spent = dict.fromkeys(phases, 0.0)
        self.done = dict.fromkeys(phases, 0)
        self.last, self.bar = time.perf_counter(), bar

    def begin(self) -> None:
        """Start of a step; without it a step starts where the one before it ended."""
        self.last = time.perf_counter()

    def step(self, name: str, what: str) -> None:
        """After a step of a phase; what: the model, for people."""
        now = time.perf_counter()
        self.spent[name] += now - self.last
        self.last = now
        self.done[name] += 1
        self.left[name] -= 1
        self.bar.show(what, f"{name}, {self.remaining()} left", sum(self.spent.values()), self._seconds())

    def remaining(self) -> str:
        """Time that the remaining steps will take; "at least" where a phase has no finished step yet."""
        unseen = any(self.left[name] and not self.done[name] for name in self.left)
        return f"{'at least ' * unseen}{tqdm.format_interval(self._seconds())}"

    def _seconds(self) -> float:
        # By phase: a step of the attack takes another time than one of the estimates.
        return sum(self.left[name] * self.spent[name] / self.done[name] for name in self.left if self.done[name])
