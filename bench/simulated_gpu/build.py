"""The simulated GPU's library, built with g++ on first use from what torch's own dependencies bring along."""

import hashlib
import os
import runpy
import shutil
import subprocess
import tempfile
from importlib.util import find_spec
from pathlib import Path

SOURCES = Path(__file__).parent
NAME = "libcuda.so.1"
HELD_AGAINST = ("2.14",)  # versions of torch whose calls were compared with what is simulated
CUDA = "13"
RUNTIME = ("torch_cuda", "c10_cuda", "torch_python", "torch_cuda_linalg")  # torch's libraries that call CUDA


def cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mimir_fast"


def torch_version() -> tuple[str, str]:
    """Versions of torch and of the CUDA that it was built for ("" without); importing torch would take seconds."""
    torch = _package("torch")
    if torch is None:
        return "", ""
    found = runpy.run_path(str(torch / "version.py"))
    return found["__version__"], found["cuda"] or ""


def _package(name: str) -> Path | None:
    """Folder of an installed package, found without importing it."""
    spec = find_spec(name)
    return Path(spec.origin).parent if spec is not None and spec.origin else None


def unsuitable() -> str:
    """Why this torch is refused; "" if it is not."""
    version, cuda = torch_version()
    if version.startswith(tuple(f"{known}." for known in HELD_AGAINST)) and cuda.startswith(f"{CUDA}."):
        return ""
    found = f"torch {version} for {'CUDA ' + cuda if cuda else 'CPUs'}" if version else "no torch"
    return (
        f"simulated_gpu: held against torch {', '.join(HELD_AGAINST)} for CUDA {CUDA}, found {found}; "
        "python -m bench.simulated_gpu --missing lists the calls that are not simulated, --any_torch tries all the same"
    )


def include_folders() -> list[Path]:
    """Where CUDA's headers are: in NVIDIA's wheels, in Triton's (which completes them), in an installed toolkit."""
    wheels = [Path(p) / f"cu{CUDA}" for p in getattr(find_spec("nvidia"), "submodule_search_locations", None) or ()]
    triton = _package("triton")
    within = [triton / "backends" / "nvidia"] if triton else []
    toolkit = [Path(os.environ.get("CUDA_HOME") or "/usr/local/cuda")]
    return [home / "include" for home in (*wheels, *within, *toolkit) if (home / "include").is_dir()]


def missing() -> str:
    """What this machine lacks to simulate a GPU; "" if nothing."""
    if not shutil.which("g++"):
        return "simulated_gpu: no g++ here; it compiles the simulation on first use"
    found = include_folders()
    for header in ("cuda.h", "cuda_runtime_api.h", "crt/host_defines.h", "cublasLt.h", "cusolverDn.h"):
        if not any((folder / header).exists() for folder in found):
            where = ", ".join(map(str, found)) or "no folder of CUDA headers"
            return f"simulated_gpu: no {header} in {where}; torch's wheels for CUDA {CUDA} bring it along"
    return ""


def library() -> Path:
    """The library's file, in the user's cache.  Raises ValueError with one line if it cannot be built."""
    reason = missing()
    if reason:
        raise ValueError(reason)
    folders = include_folders()
    sources = sorted(SOURCES.glob("*.[ch]pp"))
    key = hashlib.sha256(b"".join(f.read_bytes() for f in sources) + repr([torch_version(), folders]).encode())
    built = cache() / f"simulated_gpu-{key.hexdigest()[:12]}" / NAME
    if not built.exists():
        built.parent.mkdir(parents=True, exist_ok=True)
        _compile([str(f) for f in sources if f.suffix == ".cpp"], folders, built)
    return built


def _compile(sources: list[str], folders: list[Path], target: Path) -> None:
    """Atomically, for several processes may find it missing at once."""
    includes = [word for folder in folders for word in ("-idirafter", str(folder))]
    flags = ["-O1", "-shared", "-fPIC", "-std=c++17", *includes, f"-Wl,-soname,{NAME}"]
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        new = Path(folder) / NAME
        done = subprocess.run(["g++", *flags, *sources, "-o", str(new), "-ldl"], capture_output=True, text=True)
        if done.returncode:
            first = next((line for line in done.stderr.splitlines() if "error" in line), done.stderr)
            raise ValueError(f"simulated_gpu: g++ failed: {first.strip()}")
        new.replace(target)


def missing_calls() -> list[str]:
    """Functions of the CUDA runtime that this torch calls and that are not simulated."""
    torch = _package("torch")
    libraries = [torch / "lib" / f"lib{name}.so" for name in RUNTIME] if torch else []
    files = [library for library in libraries if library.exists()]
    called = _symbols("--undefined-only", *files)
    return sorted(
        name for name in called - _symbols("--defined-only", library()) if name.lstrip("_").startswith("cuda")
    )


def _symbols(which: str, *files: Path) -> set[str]:
    done = subprocess.run(["nm", "-D", which, *map(str, files)], capture_output=True, text=True, check=True)
    return {line.split()[-1].split("@")[0] for line in done.stdout.splitlines() if len(line.split()) > 1}
