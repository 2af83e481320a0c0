"""Records of measurements and of prices: one JSON line each, headed by where and when they come from."""

import argparse
import ctypes
import datetime
import json
import platform
import re
import statistics
import subprocess
from functools import cache
from pathlib import Path

import torch
import triton

from bench.peaks import PEAKS, peak_of
from bench.simulated_gpu import marker

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench" / "results"
SIMULATED = "simulated-"  # how a device is called where nothing was measured; "pretend-" in records of before


def parser(verb: str, doc: str | None, epilog: str, file: str | None = None) -> argparse.ArgumentParser:
    """A verb's parser, with the flags that all verbs have.  file: of its records in bench/results, if it keeps any."""
    found = argparse.ArgumentParser(
        prog=f"python -m bench {verb}",
        # None under python -OO.
        description=doc and doc.split(": ", 1)[1],
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    found.add_argument("--simulate", choices=list(PEAKS), help="run on a simulated GPU, which has no times")
    if file:
        default = str(RESULTS / file)
        found.add_argument("--results", default=default, metavar="FILE", help="JSON lines to append to (%(default)s)")
    return found


def words(text: str) -> list[str]:
    """ "a,b" -> ["a", "b"]."""
    return [word for word in text.split(",") if word]


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
        "driver": None if device == "cpu" or device.startswith(SIMULATED) else driver(),
    }


def device_name(device: torch.device) -> str:
    """As records call it: cpu, the GPU's own name, or simulated-NAME."""
    if device.type == "cpu":
        return "cpu"
    name = torch.cuda.get_device_name(device)
    return f"{SIMULATED}{peak_of(name)}" if marker() else name


def peaks_of(device: str, gpu: str | None = None) -> str | None:
    """Key of PEAKS for a record's device, None where they are not known: on any CPU."""
    try:
        return None if device == "cpu" else gpu or peak_of(device)
    except ValueError:
        return None


def driver() -> str | None:
    """The CUDA version that the installed driver supports, "13.0"; None without a driver."""
    version = ctypes.c_int()
    try:
        wrong = ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version))
    except OSError:
        return None
    return None if wrong else f"{version.value // 1000}.{version.value % 1000 // 10}"


def table(columns: str, rows: list[dict]) -> str:
    """Markdown.  columns: "head=format; ...", lines of them."""
    heads, formats = zip(*(column.split("=", 1) for column in re.split(r"; |\n", columns)))
    lines = [heads, ["---"] * len(heads), *([text.format(**row) for text in formats] for row in rows)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def percentiles(values: list[float]) -> dict[str, float]:
    """The 20th and the 80th; of one value, that value."""
    cuts = statistics.quantiles(values, n=5, method="inclusive") if len(values) > 1 else values
    return {"20": cuts[0], "80": cuts[-1]}


def append(record: dict, results: Path | str) -> None:
    """One more line of JSON."""
    results = Path(results)
    results.parent.mkdir(parents=True, exist_ok=True)
    with results.open("a") as file:
        file.write(json.dumps(record) + "\n")


@cache  # what runs is what was loaded, whatever is committed meanwhile
def _git(*arguments: str) -> str:
    done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=False)
    return done.stdout.strip()
