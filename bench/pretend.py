"""Commands started once more under a program that pretends to be a GPU."""

import subprocess
from pathlib import Path

from bench.peaks import PEAKS


def start_under(wrapper: str, gpu: str, log: str, command: list[str]) -> int:
    """Run a command under the wrapper, which writes its log; returns the exit status.

    gpu: which GPU it pretends to be, a key of PEAKS.  Raises ValueError if the wrapper is not there.
    """
    if not Path(wrapper).is_file():
        raise ValueError(f"pretend: no file {wrapper}; give the path of the pretend GPU's wrapper program")
    machine = ["--arch", str(PEAKS[gpu].arch), "--mem-mb", str(PEAKS[gpu].memory_mib), "--log", log]
    return subprocess.run([str(Path(wrapper).resolve()), *machine, *command], check=False).returncode
