"""Places that a run writes its numbers to.

None is worth ending a training for: what a disk, a terminal or a service refuses is said once, and training goes on.
"""

import contextlib
import sys
from collections.abc import Callable
from pathlib import Path

from tqdm import tqdm

from mimir_fast.checkpoints.atomic import append_text

Say = Callable[[str], None]


class Console:
    """Lines on stdout, and on a terminal a progress bar of `total` steps on stderr, `done` of them before this run."""

    def __init__(self, total: int, done: int):
        self.bar: tqdm | None = None
        if sys.stderr.isatty():
            self.bar = tqdm(total=total, initial=done, unit="step", dynamic_ncols=True)

    @staticmethod
    def say(text: str) -> None:
        """Print a line without breaking the bar."""
        try:
            tqdm.write(text, file=sys.stdout)
            sys.stdout.flush()
        # The terminal was closed, the reader of a pipe is gone, the disk of a redirected output is full.
        except (OSError, ValueError):
            pass

    def advance(self) -> None:
        """One step more."""
        self._draw(lambda bar: bar.update(1))

    def note(self, text: str) -> None:
        """Text behind the bar."""
        self._draw(lambda bar: bar.set_postfix_str(text))

    def close(self) -> None:
        self._draw(lambda bar: bar.close())

    def _draw(self, draw: Callable[[tqdm], object]) -> None:
        if self.bar is None:
            return
        try:
            draw(self.bar)
        except (OSError, ValueError):
            self.bar = None


def can_show(character: str) -> bool:
    """Whether stdout's encoding has a character."""
    try:
        character.encode(sys.stdout.encoding or "ascii")
    except UnicodeEncodeError:
        return False
    return True


class Lines:
    """Lines of a file, on the disk after every `add`; those that the disk refuses are tried again with the next ones."""

    def __init__(self, path: Path, say: Say):
        self.path, self.say, self.waiting = path, say, ""

    def add(self, lines: str) -> None:
        """Append whole lines."""
        refused_before, self.waiting = bool(self.waiting), self.waiting + lines
        try:
            append_text(self.path, self.waiting)
        except OSError as error:
            if not refused_before:
                self.say(f"warning: {error}; training goes on, the lines are kept and tried again")
            return
        self.waiting = ""
        if refused_before:
            self.say(f"{self.path} can be written again, nothing is missing in it")

    def close(self) -> None:
        if self.waiting:
            self.say(f"warning: {self.waiting.count(chr(10))} lines are missing in {self.path}")


class WandbRun:
    """A run at Weights & Biases: `identity` is its id, which the run that resumes passes on.

    Raises ValueError if the package is not installed.
    """

    def __init__(self, output_dir: str, flat: dict, say: Say, identity: str | None = None):
        try:
            import wandb
        except ImportError as error:
            raise ValueError(
                "wandb: the package is not installed; pip install 'mimir-fast[wandb]' or leave the flag out"
            ) from error
        self.say, self.identity, self.run = say, identity, None
        # allow: where the service has lost that run, a new one is begun under its id.
        resumed = {"id": identity, "resume": "allow"} if identity else {}
        with self._excused():
            self.run = wandb.init(project="mimir_fast", dir=output_dir or None, config=flat, **resumed)
            self.identity = getattr(self.run, "id", identity)

    def log(self, values: dict, step: int) -> None:
        """Log values, None left out, at an update."""
        if self.run is not None:
            with self._excused():
                self.run.log({key: value for key, value in values.items() if value is not None}, step=step)

    def close(self) -> None:
        if self.run is not None:
            with self._excused():
                self.run.finish()

    @contextlib.contextmanager
    def _excused(self):
        # A service that cannot be reached raises errors of many kinds.
        try:
            yield
        except Exception as error:
            first = str(error).partition("\n")[0]
            self.say(f"warning: wandb: {type(error).__name__}: {first}; training goes on without it")
            self.run = None
