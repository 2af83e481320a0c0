"""Records of measurements and of prices: one JSON line each, headed by where and when they come from."""

import ctypes
import datetime
import json
import platform
import subprocess
from pathlib import Path

import torch
import triton

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench" / "results"
PRETEND = "pretend"  # how the device of a record begins where nothing was measured


def heading(device: str) -> dict:
    """Where and when a record comes from; the commit ends in + if files other than records differ from it."""
    changed = _git("status", "--porcelain", "-uno", "--", ".", f":!{RESULTS.relative_to(ROOT)}")
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": _git("rev-parse", "--short", "HEAD") + ("+" if changed else ""),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "python": platform.python_version(),
        "device": device,
        "driver": None if device == "cpu" or is_pretend(device) else driver(),
    }


def is_pretend(device: str) -> bool:
    """Whether a record comes from a pretend GPU, which has no times."""
    return device.startswith(PRETEND)


def driver() -> str | None:
    """The CUDA version that the installed driver supports, "13.0"; None without a driver."""
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    version = ctypes.c_int()
    if cuda.cuDriverGetVersion(ctypes.byref(version)):
        return None
    return f"{version.value // 1000}.{version.value % 1000 // 10}"


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
