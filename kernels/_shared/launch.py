"""Launches: how a kernel is launched, and how an operation tells the compile gate which kernels it can launch."""

import math
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from torch._C._dynamo.guards import _empty_strided_cuda as allocate  # type: ignore[attr-defined]
from triton import knobs

from mimir_fast.kernels._shared.tiles import FORGET

STORAGE = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
# Whether multiply-adds are fused is said at every launch: Triton's default depends on its version.
FUSED = {"enable_fp_fusion": True}
# The versions of Triton whose compiled kernels `_handle` knows how to launch; any other version launches them itself.
HANDLES = ("3.5", "3.6", "3.7", "3.8")
VERSION = ".".join(triton.__version__.split(".")[:2])
# Addresses of torch's allocations are multiples of it, and Triton compiles another kernel where one is not.
ALIGNMENT = 16


def memoised(function: Callable) -> Callable:
    """For what follows from shapes, dtypes and flags: computed once, for more of them than a run has.

    Chosen tile sizes are among the flags, so that what was computed is forgotten when others are chosen.
    """
    found = lru_cache(maxsize=1024)(function)
    FORGET.append(found.cache_clear)
    return found


# A result's shape and dtype; None where the kernel writes nothing.
Result = tuple[tuple[int, ...], torch.dtype] | None


class Prepared:
    """A kernel with its grid, its results' shapes, its numbers and options: called with tensors, it is launched.

        launch = Prepared(kernel, grid, n, results=[((n,), torch.float32)], BLOCK=256, num_warps=4)
        (y,) = launch(x, None)

    The kernel's parameters are the tensors given (None where there is none), the results, which are allocated here and are
    contiguous, then numbers, in order, then constants, by name.

    Triton's own launch specialises every argument anew and looks the compiled kernel up by a string of all of it, 16 us of
    host time.  Here the compiled kernel is kept by what is not fixed and Triton specialises on: the device, and of every
    tensor its dtype, or None.  Whether addresses are multiples of 16 is the rest of it: where one is not, Triton launches.
    So it does on other devices than CUDA, under a profiler's hooks, and in a version that is not among HANDLES.
    """

    def __init__(
        self,
        kernel: triton.JITFunction,
        grid: tuple[int, ...],
        *numbers: float,
        results: Sequence[Result] = (),
        **options,
    ):
        self.kernel, self.grid = kernel, grid
        # Constants become arguments by place here; what stays in options, such as num_warps, is for the compiler.
        self.numbers = (*numbers, *(options.pop(name) for name in kernel.arg_names if name in options))
        self.options = options
        self.results = [result and (tuple(result[0]), contiguous_strides(result[0]), result[1]) for result in results]
        # Triton's launcher takes three sizes.
        self.sizes = (*grid, 1, 1)[:3]
        self._compiled: dict[tuple, tuple] = {}

    def __call__(self, *tensors: Tensor | None) -> list[Any]:
        if (launches := _recording.launches) is not None:
            return self._recorded(tensors, launches)
        key: list[torch.dtype | int | None] = []
        addresses: list[int | None] = []
        results: list[Any] = []
        bits = 0
        for tensor in tensors:
            if tensor is None:
                key.append(None)
                addresses.append(None)
            else:
                given, address = tensor, tensor.data_ptr()
                # One test serves all tensors: a low bit stays set if any address has it.
                bits |= address
                addresses.append(address)
                key.append(tensor.dtype)
        # The last tensor's stands for all: op.py has checked that they are on one device.
        device = given.get_device()
        handle = self._compiled.get((device, *key))
        if handle is None or bits % ALIGNMENT or unusual(device):
            return self._launched_by_triton(given, tensors, (device, *key), bits % ALIGNMENT == 0)
        for layout in self.results:
            if layout is None:
                results.append(None)
                addresses.append(None)
            else:
                results.append(allocate(*layout))
                addresses.append(results[-1].data_ptr())
        launch, arguments, _ = handle
        stream = torch._C._cuda_getCurrentRawStream(device)
        launch(*self.sizes, stream, *arguments, (*addresses, *self.numbers))
        return results

    def _recorded(self, tensors: tuple, launches: list["Recorded"]) -> list[Any]:
        _recording.launches = None
        try:
            results = self(*tensors)
        finally:
            _recording.launches = launches
        given = [t for t in tensors if t is not None]
        key = given[-1].get_device(), *(t if t is None else t.dtype for t in tensors)
        launches.append(Recorded(self, tensors, results, self._compiled.get(key)))
        return results

    def _launched_by_triton(self, like: Tensor, tensors: tuple, key: tuple, aligned: bool) -> list[Any]:
        # Triton launches on the current device, which need not be the one that holds the tensors.
        with torch.cuda.device_of(like):
            # new_empty and not `allocate`: it fills memory with NaN where deterministic algorithms ask for that.
            results = [layout and like.new_empty(layout[0], dtype=layout[2]) for layout in self.results]
            compiled = self.kernel[self.grid](*tensors, *results, *self.numbers, **self.options)
            if like.is_cuda and aligned and VERSION in HANDLES:
                # The last keeps its machine code loaded.
                self._compiled[key] = *_handle(compiled), compiled
        return results


class Recorded(NamedTuple):
    """A launch that was recorded; handle: the compiled kernel that it took, None if that is not kept."""

    prepared: Prepared
    tensors: tuple
    results: list
    handle: tuple | None


class _Recording(threading.local):
    """Where this thread's launches are recorded: the backward pass has a thread of its own."""

    launches: list[Recorded] | None = None


_recording = _Recording()


@contextmanager
def recorded() -> Iterator[list[Recorded]]:
    """The launches that this thread makes inside, in order."""
    launches: list[Recorded] = []
    before, _recording.launches = _recording.launches, launches
    try:
        yield launches
    finally:
        _recording.launches = before


def _handle(compiled: triton.compiler.CompiledKernel) -> tuple[Callable[..., None], tuple]:
    """What launches a compiled kernel, and its arguments between stream and the kernel's own."""
    run, function, metadata = compiled.run, compiled.function, compiled.packed_metadata
    if hasattr(run, "kernel_signature") and not (run.global_scratch_size or run.profile_scratch_size):
        # From 3.7 on one function launches all kernels.  What is None here is for memory of the kernel's own, and for hooks.
        settings = run.launch_cooperative_grid, run.launch_pdl, metadata
        return run.launch, (function, *settings, *[None] * 5, run.arg_annotations, run.kernel_signature)

    def launch(x: int, y: int, z: int, stream: int, arguments: tuple) -> None:
        run(x, y, z, stream, function, metadata, None, None, None, *arguments)

    return launch, ()


def contiguous_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Those of a contiguous tensor, without one."""
    # A size of 0 counts as 1, as in the strides that torch gives to contiguous tensors.
    return tuple(math.prod(max(1, size) for size in shape[i + 1 :]) for i in range(len(shape)))


def nothing(like: Tensor) -> Tensor:
    """What an operator returns in place of a result that was not asked for: like.new_empty(0), at less host time."""
    if like.is_cuda and like.get_device() == torch._C._cuda_getDevice():
        return allocate((0,), (1,), like.dtype)
    return like.new_empty(0)


def unusual(device: int) -> bool:
    """Whether it is not the current device, memory shall be filled with NaN, or a profiler wants to be told of launches."""
    enter, leave = knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook
    return bool(
        device != torch._C._cuda_getDevice()
        or torch._C._get_deterministic_algorithms()
        or getattr(enter, "calls", enter)
        or getattr(leave, "calls", leave)
    )


@dataclass(frozen=True)
class Launch:
    """One call of launchers on tensors of device "meta": shapes, strides and dtypes, no data, nothing runs.

    The gate records every kernel that `call` launches, with its argument types, constants and warps, and compiles it.

    config    what distinguishes this call, e.g. "p16 norm"
    dtype     the storage it is about, e.g. "bf16"
    call      invokes the launchers, forward and backward
    narrow    kernels (function names) that need no 16-byte loads and stores: few bytes, or rows too short or unaligned
    archs     where it is launched: 80 is an A100, 90 an H100
    """

    config: str
    dtype: str
    call: Callable[[], object]
    narrow: frozenset[str] = frozenset()
    archs: tuple[int, ...] = (80, 90)


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """A tensor without data for `Launch.call`."""
    return torch.empty(shape, dtype=dtype, device="meta")
