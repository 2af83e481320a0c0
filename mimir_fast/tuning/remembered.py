"""What was measured before: one file per environment in the user's cache folder, and files that carry it to other machines.

An environment is all that a time depends on beside the problem: device, driver, torch, Triton, and this package.
"""

import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path

from mimir_fast.checkpoints.atomic import write_text_atomically
from mimir_fast.config.machine import cache_folder
from mimir_fast.tuning.measuring import Trial
from mimir_fast.tuning.records import Candidate, Problem

FORMAT = 1
Environment = dict[str, str]
# Problem with its batch, as text -> its trials.
Measured = dict[str, list[Trial]]


class UnusableError(ValueError):
    """A file that holds no measurements of this environment, and why."""


def key(problem: Problem) -> str:
    """Of a problem in a file: choices are for all batches, measurements of one."""
    return f"{problem} batch {problem.batch}"


def file_of(environment: Environment, folder: Path | None = None) -> Path:
    """Where an environment's measurements are kept; folder: None: the user's."""
    digest = hashlib.sha256(json.dumps(environment, sort_keys=True).encode()).hexdigest()[:12]
    name = re.sub(r"\W+", "-", environment["device"]).strip("-").lower()
    return (folder or cache_folder("tuning")) / f"{name}-{digest}.json"


def read(path: Path, environment: Environment) -> Measured:
    """The measurements of a file.  Raises UnusableError, FileNotFoundError."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        found, rows = content["environment"], content["measured"]
        if content["format"] != FORMAT:
            raise UnusableError(f"its format is {content['format']}, not {FORMAT}")
        differing = [
            f"{name} {found.get(name)}, here {own}" for name, own in environment.items() if found.get(name) != own
        ]
        if differing:
            raise UnusableError(f"it was measured with {'; '.join(differing)}")
        return {
            problem: [Trial(Candidate(*t["candidate"].split("/")), t["seconds"], t["why"]) for t in trials]
            for problem, trials in rows.items()
        }
    except FileNotFoundError:
        raise
    except UnusableError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UnusableError(f"it cannot be read ({type(error).__name__}: {error})") from error


def write(path: Path, environment: Environment, measured: Measured, flag: str) -> None:
    """Replace a file; flag: who chose it, for the message.  Raises OSError where that fails."""
    rows = {
        problem: [{"candidate": str(t.candidate), "seconds": t.seconds, "why": t.why} for t in trials]
        for problem, trials in measured.items()
    }
    content = {"format": FORMAT, "environment": environment, "measured": rows}
    write_text_atomically(path, json.dumps(content, indent=1) + "\n", flag)


def recall(environment: Environment, say: Callable[[str], None], folder: Path | None = None) -> Measured:
    """What is remembered of this environment; a line where the file cannot be used."""
    path = file_of(environment, folder)
    try:
        return read(path, environment)
    except FileNotFoundError:
        return {}
    except UnusableError as error:
        say(f"tune: {path} is not used: {error}")
        return {}


def remember(environment: Environment, new: Measured, say: Callable[[str], None], folder: Path | None = None) -> bool:
    """Add to what is remembered; returns whether it is kept, and says so in a line if not."""
    path = file_of(environment, folder)
    try:
        # Read again: another process may have written meanwhile.  Of two at once one is lost, and measured another time.
        write(path, environment, recall(environment, lambda line: None, folder) | new, "tune")
    except OSError as error:
        say(f"tune: what was measured is not kept: {error}")
        return False
    return True
