"""Progress and time left: a bar on a terminal, lines elsewhere."""

import sys
import time
from collections.abc import Callable

from tqdm import tqdm

from mimir_fast.evaluate.records import Record

SECONDS_BETWEEN_LINES = 10


class Bar:
    """A progress bar on a terminal, if it is to be shown; elsewhere a line every ten seconds, by `say`."""

    def __init__(self, say: Callable[[str], None], shown: bool = True):
        self.say, self.told = say, time.perf_counter()
        self.bar: tqdm | None = None
        # Not shown elsewhere: tqdm would write a line to a log file for every update.
        if shown and sys.stderr.isatty():
            self.bar = tqdm(total=1, bar_format="{desc} {percentage:3.0f}%|{bar}| {postfix}", leave=False)

    def show(self, what: str, text: str, done: float, left: float) -> None:
        """Show what is being done and a text; done and left: in any unit of work."""
        if self.bar is not None:
            # The total falls as images are broken: later rounds leave them out.
            self.bar.total, self.bar.n = done + left, done
            self.bar.set_description_str(what, refresh=False)
            self.bar.set_postfix_str(text)
        elif (now := time.perf_counter()) - self.told >= SECONDS_BETWEEN_LINES:
            self.told = now
            self.say(f"{what}: {text}")

    def close(self) -> None:
        """Remove the bar."""
        if self.bar is not None:
            self.bar.close()


class AttackProgress:
    """Progress of one attack.

    passes   cost of each of its rounds per image, in forward passes
    shown    whether this process shows it, of several
    The time left is that of all images that are not broken passing through all rounds at the speed so far: an upper bound,
    which falls with every image that a round breaks.
    """

    def __init__(
        self, name: str, passes: list[float], everything: bool, say: Callable[[str], None], shown: bool = True
    ):
        self.name, self.passes, self.everything = name, passes, everything
        self.started, self.done = time.perf_counter(), 0.0
        self.bar, self.elsewhere = Bar(say, shown), 0

    def begin(self) -> None:
        """At the beginning of a round, in which other processes have done nothing yet."""
        self.elsewhere = 0

    def update(self, record: Record, round: int, round_name: str, count: int, others: tuple[int, int] = (0, 0)) -> None:
        """After `count` images of a round (from 1); others: images that other processes finished in it, and how many of them
        were broken, of which the record does not know yet."""
        done, broken = others
        self.done += (count + done - self.elsewhere) * self.passes[round - 1]
        self.elsewhere = done
        left = sum(cost * len(record.left(r, self.everything)) for r, cost in enumerate(self.passes, 1))
        left -= done * self.passes[round - 1]
        left -= 0 if self.everything else broken * sum(self.passes[round:])
        eta = tqdm.format_interval((time.perf_counter() - self.started) * left / self.done)
        reached = record.reached(round, self.everything)
        finished = int((reached & (record.rounds >= round)).sum()) + done
        robust = record.correct.mean() - broken / len(record.indices)
        what = f"{self.name} {round_name}" if len(self.passes) > 1 else self.name
        text = f"{finished}/{int(reached.sum())} images, at most {robust:.1%} robust, {eta} left"
        self.bar.show(what, text, self.done, left)

    def close(self) -> None:
        """Remove the bar."""
        self.bar.close()
