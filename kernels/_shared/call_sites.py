"""Call sites: what a call of ours in compiled code launches is found out at its first call; later ones launch it again.

Compiled code has fixed shapes, and so has all that a launcher computes of them: grids, sizes, constants, results, compiled
kernels.  What is left of a call are the addresses of its tensors, the memory of its results and the stream.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import reduce
from itertools import starmap
from operator import itemgetter, or_
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._C._dynamo.guards import _reinterpret_tensor as reinterpret  # type: ignore[attr-defined]
from torch.utils._python_dispatch import TorchDispatchMode

from mimir_fast.kernels._shared.direct import CALLS, watched
from mimir_fast.kernels._shared.launch import ALIGNMENT, Recorded, allocate, recorded, unusual
from mimir_fast.kernels._shared.tiles import FORGET


class Fixed(NamedTuple):
    """A tensor argument, as compiled code has fixed it."""

    size: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: str


class Replay(NamedTuple):
    """The launches of a call: `pool` below is the addresses of its tensors, of its results, and of what is `kept`, then `rest`.

    results    of all launches: shape, strides, dtype
    kept       results without an element, the same tensors at every call
    rest       None, which is an argument too, and numbers
    launches   what launches a kernel, its grid, its arguments between stream and the kernel's own, and a function that takes
               the kernel's own out of the pool
    returned   takes what the call returns out of its tensors, its results and what is kept
    """

    device: int
    results: list[tuple]
    kept: list[Tensor]
    rest: list
    launches: list[tuple]
    returned: Callable


class CallSite:
    """A call in compiled code: called with tensors that begin where the operator's tensors begin.

    name        of an operator, a key of CALLS
    arguments   all of its arguments; where one is a tensor, its `Fixed`

    Beside its arguments and chosen tiles a launcher must read nothing that changes after its first call.  A call is not
    replayed where torch computes something between launches, under a profiler, a dispatch mode or deterministic algorithms, on
    another device than the current one, or if an address is not a multiple of 16.
    """

    def __init__(self, name: str, arguments: tuple):
        self.call, self.arguments = CALLS[name], arguments
        self.forget()

    def forget(self) -> None:
        """Find out anew, at the next call, what is launched."""
        self.replay: Replay | None = None
        self._asked = False

    def __call__(self, *tensors: Tensor) -> Any:
        replay = self.replay
        if replay is None or watched() or unusual(replay.device):
            return self._launched(tensors)
        known = (*tensors, *starmap(allocate, replay.results), *replay.kept)
        pool: list = [*map(Tensor.data_ptr, known)]
        # One test serves all addresses: a low bit stays set if any of them has it.
        if reduce(or_, pool) % ALIGNMENT:
            return self._launched(tensors)
        pool += replay.rest
        stream = torch._C._cuda_getCurrentRawStream(replay.device)
        for launch, grid, settings, own in replay.launches:
            launch(*grid, stream, *settings, own(pool))
        return replay.returned(known)

    def _launched(self, tensors: Sequence[Tensor]) -> Any:
        given, device = iter(tensors), tensors[-1].get_device()
        arguments = [
            reinterpret(next(given), value.size, value.stride, 0) if isinstance(value, Fixed) else value
            for value in self.arguments
        ]
        if self._asked or device < 0 or watched() or unusual(device):
            return self.call(*arguments)
        self._asked = True
        with recorded() as launches, _TorchOperators() as others:
            returned = self.call.launch(*arguments)
        if not others.seen:
            viewed = [argument for argument in arguments if isinstance(argument, Tensor)]
            self.replay = _replay(device, viewed, launches, returned)
        return returned


_SITES: dict[tuple, CallSite] = {}


def call_site(name: str, arguments: tuple) -> CallSite:
    """The site that fixes all of this; a model's blocks share theirs."""
    return _SITES.setdefault((name, arguments), CallSite(name, arguments))


@FORGET.append
def _forget() -> None:
    for site in _SITES.values():
        site.forget()


# Operators that compute nothing on a device, of those that launchers call.
_HARMLESS = (torch.ops.aten.new_empty, torch.ops.aten.promote_types)


class _TorchOperators(TorchDispatchMode):
    """Notes which operators of torch are called inside and compute something."""

    def __init__(self):
        super().__init__()
        self.seen: list = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket not in _HARMLESS:
            self.seen.append(func)
        return func(*args, **(kwargs or {}))


def _replay(device: int, tensors: list[Tensor], launches: list[Recorded], returned: Any) -> Replay | None:
    """None if a launch cannot be repeated, or takes or the call returns what is neither given nor a result."""
    several = isinstance(returned, (tuple, list))
    outputs = list(returned) if several else [returned]
    made = list({id(t): t for t in (*_results(launches), *(t for t in outputs if t.numel() == 0))}.values())
    results, kept = [t for t in made if t.numel()], [t for t in made if not t.numel()]
    known, rest, steps = [*tensors, *results, *kept], [None], []
    places = {id(value): place for place, value in enumerate([*known, None])}
    for launch in launches:
        own = [places.get(id(t), -1) for t in (*launch.tensors, *launch.results)]
        if launch.handle is None or min(own) < 0:
            return None
        first = len(known) + len(rest)
        rest += launch.prepared.numbers
        own += range(first, len(known) + len(rest))
        function, settings, _ = launch.handle
        steps.append((function, launch.prepared.sizes, settings, itemgetter(*own)))
    found = [places.get(id(t), -1) for t in outputs]
    if min(found) < len(tensors):
        return None
    layouts = [(tuple(t.shape), t.stride(), t.dtype) for t in results]
    return Replay(device, layouts, kept, rest, steps, _taker(found, several))


def _results(launches: list[Recorded]) -> Iterator[Tensor]:
    return (t for launch in launches for t in launch.results if t is not None)


def _taker(places: list[int], several: bool) -> Callable:
    """Takes what stands at these places: a tuple, or of one place that alone."""
    if several and len(places) == 1:
        return lambda values: (values[places[0]],)
    return itemgetter(*places)
