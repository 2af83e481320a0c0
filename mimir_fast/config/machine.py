"""What a program needs of its machine before anything runs: folders it may write to, outputs that take any character, threads.

Nothing here is worth ending a run for: what is missing is replaced.
"""

import contextlib
import io
import math
import os
import sys
import tempfile
from pathlib import Path

import torch

# Variables of other packages -> folder below ours where the home folder cannot be used.
FOLDERS = {
    "TORCHINDUCTOR_CACHE_DIR": "inductor",
    "TRITON_CACHE_DIR": "triton",
    "TORCH_HOME": "torch",
    "MPLCONFIGDIR": "matplotlib",
}
CGROUP = Path("/sys/fs/cgroup")


def prepare_machine() -> None:
    """Make the folders for compiled code and other packages' files, and let the outputs take any text; may be called again."""
    for stream in (sys.stdout, sys.stderr):
        # A class name or path that the terminal's encoding lacks is written as \\xfc instead of ending the program.
        if isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
            # It writes what waits first, which a closed output refuses.
            with contextlib.suppress(OSError):
                stream.reconfigure(errors="backslashreplace")
    keep_compiled_code()


def keep_compiled_code() -> None:
    """Keep compiled code in the user's cache folder, so that the next run finds it; a folder set by the user stays.

    Where the home folder cannot be written to, this and what other packages keep there goes to the temporary folder.
    """
    # Before anything asks Inductor for a compiler: it would set this variable itself, to a folder that a reboot empties.
    if os.environ.get("TORCHINDUCTOR_CACHE_DIR"):
        return
    if folder := _home_folder("inductor"):
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder)
        return
    root = _own_temporary_folder()
    for variable, name in FOLDERS.items():
        os.environ.setdefault(variable, str(root / name))


def cache_folder(name: str) -> Path:
    """A folder of ours in the user's cache, or below the temporary folder where the home folder cannot be written to."""
    return _home_folder(name) or _own_temporary_folder() / name


def _home_folder(name: str) -> Path | None:
    """A folder of ours in the cache of the home folder, which is made; None where it cannot be written to."""
    with contextlib.suppress(OSError, RuntimeError):
        folder = Path.home() / ".cache" / "mimir_fast" / name
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK | os.X_OK):
            return folder
    return None


def kept_elsewhere() -> str:
    """A line to print where compiled code is not kept in the home folder; else nothing."""
    folder = Path(os.environ.get("TORCHINDUCTOR_CACHE_DIR", ""))
    if folder.parent.name not in (f"mimir_fast-{os.getuid()}", ".mimir_fast"):
        return ""
    return f"compile: the home folder cannot be written to; compiled code is kept in {folder}"


def _own_temporary_folder() -> Path:
    """A folder below the temporary one that belongs to this user alone: code that is found there is run."""
    with contextlib.suppress(OSError):
        root = Path(tempfile.gettempdir()) / f"mimir_fast-{os.getuid()}"
        root.mkdir(mode=0o700, exist_ok=True)
        # Anybody may have made a folder of this name before, or a link to another one.
        if root.stat().st_uid == os.getuid() and not root.is_symlink() and os.access(root, os.W_OK | os.X_OK):
            return root
    # Without any temporary folder: where the program runs.
    return Path.cwd() / ".mimir_fast"


def usable_cpus() -> int:
    """Processors that this process may use: by its affinity, and by the quota of its container."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    # `allowed` twice: without a quota min would be given a single number, which it takes for a sequence.
    return min(allowed, *(max(1, math.ceil(quota)) for quota in _quotas()), allowed)


def _quotas() -> list[float]:
    """The container's quota in processors, from cgroup v2 or v1; none where there is no limit."""
    with contextlib.suppress(OSError, ValueError):
        quota, period = (CGROUP / "cpu.max").read_text(encoding="utf-8").split()
        return [] if quota == "max" else [int(quota) / int(period)]
    with contextlib.suppress(OSError, ValueError):
        files = (CGROUP / "cpu" / f"cpu.cfs_{name}_us" for name in ("quota", "period"))
        quota_us, period_us = (int(path.read_text(encoding="utf-8")) for path in files)
        return [quota_us / period_us] if quota_us > 0 else []
    return []


def limit_threads() -> None:
    """No more threads than processors: torch counts the machine's, of which a container may have a share.

    OMP_NUM_THREADS and MKL_NUM_THREADS, where they are set, decide alone.
    """
    if not any(os.environ.get(name) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")):
        usable = usable_cpus()
        if usable < torch.get_num_threads():
            torch.set_num_threads(usable)
