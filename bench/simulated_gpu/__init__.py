"""A simulated GPU: the CUDA path of a program runs through on a machine without one, and every call is logged.

A library is loaded before torch and takes the place of the CUDA runtime, the driver and the matrix products and solvers of
cuBLAS and cuSOLVER.  Kernels are logged and do nothing: launches, matrix products, copies, waits and the peak of torch's own
allocator are exact, Triton's kernels really are compiled; values are zeros, and times do not exist.  cuDNN and NCCL are not
there.  simulated.hpp describes the log.

    python -m bench.simulated_gpu --gpu h100 --log calls.log python script.py
"""

import ctypes
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from bench.peaks import PEAKS
from bench.simulated_gpu.build import library

LOG = "SIMULATED_GPU_LOG"


def environment(gpu: str, log: Path | str = os.devnull, memory_mib: int | None = None) -> dict[str, str]:
    """The environment in which a program finds the GPU (a key of PEAKS); its calls are appended to the log.

    Builds the library if need be.  Raises ValueError if it cannot be built here.
    """
    peak, built = PEAKS[gpu], library()
    own = {
        LOG: str(Path(log).resolve()),
        "SIMULATED_GPU_NAME": peak.device,
        "SIMULATED_GPU_ARCH": str(peak.arch),
        "SIMULATED_GPU_MEMORY_MIB": str(memory_mib or peak.memory_mib),
        "LD_PRELOAD": str(built),
        "TRITON_LIBCUDA_PATH": str(built.parent),
    }
    # Triton and Inductor tune by times that mean nothing here: what they keep must not reach a real GPU
    caches = {f"{name}_CACHE_DIR": str(built.parent / name.lower()) for name in ("TRITON", "TORCHINDUCTOR")}
    return {**os.environ, **caches, **own}


def marker() -> Callable[[str], None] | None:
    """What writes a mark into the log of this process's simulated GPU; None on a real GPU or without one."""
    mark = getattr(ctypes.CDLL(None), "simulated_gpu_mark", None)
    return None if mark is None else lambda text: mark(text.encode())


@contextmanager
def host_timed() -> Iterator[None]:
    """While inside, this process's simulated GPU logs nothing and carries out small copies only: they are not the host's."""
    switch = ctypes.CDLL(None).simulated_gpu_time_host
    switch(1)
    try:
        yield
    finally:
        switch(0)
