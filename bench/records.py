"""Records of measurements and of prices: one JSON line each, headed by where and when they come from."""

import datetime
import json
import platform
import subprocess
from pathlib import Path

import torch
import triton

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench" / "results"


def heading(device: str) -> dict:
    """Where and when a record comes from; the commit ends in + if files differ from it."""
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": _git("rev-parse", "--short", "HEAD") + ("+" if _git("status", "--porcelain", "-uno") else ""),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "python": platform.python_version(),
        "device": device,
    }


def append(record: dict, results: Path) -> None:
    """One more line of JSON."""
    results.parent.mkdir(parents=True, exist_ok=True)
    with results.open("a") as file:
        file.write(json.dumps(record) + "\n")


def partition(arguments: list[str]) -> tuple[list[str], list[str]]:
    """A command's own words, and the trainer's after --."""
    where = arguments.index("--") if "--" in arguments else len(arguments)
    return arguments[:where], arguments[where + 1 :]


def _git(*words: str) -> str:
    done = subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True, check=False)
    return done.stdout.strip()
