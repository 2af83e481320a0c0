"""How far an attack is and how long it will still take: a bar on a terminal, lines elsewhere."""

import sys
import time
from collections.abc import Callable

from tqdm import tqdm

from mimir_fast.evaluate.records import Record

SECONDS_BETWEEN_LINES = 10


class Progress:
    """One attack's progress.  passes: cost of each of its rounds per image, in forward passes.

    The time left is that of all images still standing going through all rounds, at the speed so far: each image that a round
    breaks makes it shorter, nothing makes it longer but a slower machine.
    """

    def __init__(self, name: str, passes: list[float], everything: bool, say: Callable[[str], None]):
        self.name, self.passes, self.everything, self.say = name, passes, everything, say
        self.started = self.told = time.perf_counter()
        self.done = 0.0
        self.bar = None
        if sys.stderr.isatty():
            self.bar = tqdm(total=1, bar_format="{desc} {percentage:3.0f}%|{bar}| {postfix}", leave=False)

    def update(self, record: Record, round: int, round_name: str, count: int) -> None:
        """After `count` images of a round (from 1)."""
        self.done += count * self.passes[round - 1]
        left = sum(cost * len(record.left(r, self.everything)) for r, cost in enumerate(self.passes, 1))
        now = time.perf_counter()
        eta = tqdm.format_interval((now - self.started) * left / self.done)
        reached = record.reached(round, self.everything)
        finished = int((reached & (record.rounds >= round)).sum())
        where = f"{self.name} {round_name}" if len(self.passes) > 1 else self.name
        text = f"{finished}/{int(reached.sum())} images, at most {record.correct.mean():.1%} robust, {eta} left"
        if self.bar is not None:
            self.bar.total, self.bar.n = self.done + left, self.done
            self.bar.set_description_str(where, refresh=False)
            self.bar.set_postfix_str(text)
        elif now - self.told >= SECONDS_BETWEEN_LINES:
            self.told = now
            self.say(f"{where}: {text}")

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
