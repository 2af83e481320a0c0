"""Step graph: work on the device that is captured once and then launched as CUDA graphs.

A captured piece of work is launched again with the same addresses and the same plain numbers: tensors that it reads are
static and written between two launches, plain numbers in it must never change.  A Recorder does the capturing; the one
for CUDA is CudaRecorder, tests have one that records a tape of operations on the CPU.
"""

from collections.abc import Callable, Hashable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

# Updates that run uncaptured before the capture: they compile, load kernels and make the optimizer's state.
WARM_UP = 3


class Recorder(Protocol):
    """How work is recorded and repeated.

    executes   whether work is done while it is recorded; a CUDA graph only does it when it is launched
    """

    executes: bool

    def context(self) -> AbstractContextManager:
        """Context in which everything must run that is recorded or comes before and after it."""
        ...

    def begin(self) -> None:
        """Begin a stretch of work."""
        ...

    def end(self) -> Callable[[], None]:
        """End the stretch; returns what launches it."""
        ...

    def abandon(self) -> None:
        """End a stretch that failed."""
        ...

    def release(self) -> None:
        """Give the memory of everything recorded back, once its outputs are let go of."""
        ...


class CudaRecorder:
    """CUDA graphs of one memory pool, on a stream of their own."""

    executes = False

    def __init__(self, device: torch.device):
        self.stream = torch.cuda.Stream(device)
        self._graphs: list[torch.cuda.CUDAGraph] = []
        self._open = ExitStack()

    @contextmanager
    def context(self) -> Iterator[None]:
        """On the graphs' stream: handles and autograd's nodes that belong to another one would break a capture."""
        caller = torch.cuda.current_stream(self.stream.device)
        self.stream.wait_stream(caller)
        with torch.cuda.stream(self.stream):
            yield
        caller.wait_stream(self.stream)

    def begin(self) -> None:
        graph = torch.cuda.CUDAGraph()
        pool = self._graphs[0].pool() if self._graphs else None
        # The thread that pins batches may allocate meanwhile: only this thread is held to the rules.
        mode = "thread_local"
        self._graphs.append(graph)
        self._open.enter_context(torch.cuda.graph(graph, pool=pool, stream=self.stream, capture_error_mode=mode))

    def end(self) -> Callable[[], None]:
        self._open.close()
        return self._graphs[-1].replay

    def abandon(self) -> None:
        try:
            self._open.close()
        # A capture that an illegal call has invalidated cannot be ended either.
        except RuntimeError:
            torch.cuda.synchronize(self.stream.device)
        # It has no pool that the next one could share.
        self._graphs.pop()

    def release(self) -> None:
        for graph in self._graphs:
            graph.reset()
        self._graphs.clear()


class CaptureError(RuntimeError):
    """Work could not be captured; nothing of it was done."""


class Piece:
    """Captured work.

    launches   what launches its parts, in order
    output     its outputs, which every launch writes to the same addresses
    done       whether recording it was its first launch
    """

    def __init__(self) -> None:
        self.launches: list[Callable[[], object]] = []
        self.output: Any = None
        self.done = False

    def launch(self) -> Any:
        for launch in self.launches:
            launch()
        return self.output


# The graph that is being captured; outside of captures None.
_capturing: "StepGraph | None" = None


def outside(work: Callable[[], Any], in_place: bool = False) -> Any:
    """Work that a capture cannot hold: it runs as it is, between two graphs, whenever they are launched.

    work       without arguments; returns tensors, which keep their addresses from one launch to the next
    in_place   its results are in tensors that were there before
    """
    return work() if _capturing is None else _capturing.leave(work, in_place)


def leaves(name: str, always: bool = False) -> bool:
    """Whether the capture under way, if there is one, is to leave this work `outside`: always, or after it failed once."""
    return _capturing is not None and _capturing.leaves(name, always)


class StepGraph:
    """Pieces of work by key, each captured once and launched again and again.

    left   names of work that captures leave outside
    """

    def __init__(self, recorder: Recorder):
        self.recorder, self.pieces = recorder, dict[Hashable, Piece]()
        self.left: set[str] = set()
        self._held: set[str] = set()
        self._piece: Piece | None = None

    def launch(self, key: Hashable) -> Any:
        """Launch the piece of this key; returns its outputs."""
        piece = self.pieces[key]
        if piece.done:
            piece.done = False
            return piece.output
        return piece.launch()

    def capture(self, key: Hashable, work: Callable[[], Any]) -> None:
        """Capture a piece, which is to be launched next.

        Raises CaptureError where it cannot be captured, torch.OutOfMemoryError where its memory does not fit.
        """
        global _capturing
        self._piece = piece = Piece()
        try:
            self.recorder.begin()
            _capturing = self
            # The outputs' autograd graphs are not needed any more, and would keep their tensors.
            piece.output = tree_map_only(Tensor, Tensor.detach, work())
            _capturing = None
            piece.launches.append(self.recorder.end())
        except torch.OutOfMemoryError:
            self.recorder.abandon()
            raise
        except RuntimeError as error:
            self.recorder.abandon()
            raise CaptureError(str(error).strip().partition("\n")[0]) from error
        finally:
            _capturing = self._piece = None
        piece.done = self.recorder.executes
        self.pieces[key] = piece

    def release(self) -> None:
        """Give the memory back; what is run next is captured again."""
        self.pieces.clear()
        self.recorder.release()

    def leaves(self, name: str, always: bool) -> bool:
        """See `leaves`."""
        (self.left if always else self._held).add(name)
        return name in self.left

    def leave_more(self) -> set[str]:
        """After a capture that failed: leave out all that can be; returns what was not left out yet."""
        more = self._held - self.left
        self.left |= more
        return more

    def leave(self, work: Callable[[], Any], in_place: bool) -> Any:
        """See `outside`."""
        assert self._piece is not None
        self._piece.launches.append(self.recorder.end())
        # Where nothing was done yet, work in place waits for the launch: it may be a collective of all processes.
        made = None if in_place and not self.recorder.executes else self._left(work)
        self._piece.launches.append(work if in_place else lambda: _overwrite(made, work()))
        self.recorder.begin()
        return made

    def _left(self, work: Callable[[], Any]) -> Any:
        global _capturing
        _capturing = None
        try:
            return work()
        finally:
            _capturing = self


def _overwrite(made: Any, new: Any) -> None:
    for old, tensor in zip(tree_leaves(made), tree_leaves(new), strict=True):
        old.copy_(tensor)


class StaticTensors:
    """Tensors that are written anew for every launch: copies of what is put in, at the same addresses every time."""

    def __init__(self) -> None:
        self.tensors: list[Tensor] = []
        self._placed: Tensor | None = None

    def place(self, shape: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
        """The same tensor at every call: who writes the first input there saves its copy."""
        if self._placed is None:
            self._placed = torch.empty(shape, dtype=dtype, device=device)
        return self._placed

    def put(self, tensors: list[Tensor], device: torch.device) -> list[Tensor]:
        """The copies, on the device; a copy from pinned memory does not wait.  Shapes and dtypes must be the first ones."""
        if not self.tensors:
            self.tensors = [t if t is self._placed else torch.empty_like(t, device=device) for t in tensors]
        for own, tensor in zip(self.tensors, tensors, strict=True):
            assert own.shape == tensor.shape, "a captured step's batches have one shape"
            if own is not tensor:
                own.copy_(tensor, non_blocking=True)
        return self.tensors

    def release(self) -> None:
        """Give the memory back, but for `place`'s, where the next input may be already."""
        self.tensors = []
