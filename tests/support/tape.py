"""CUDA graphs on the CPU, for tests: a tape of operations that is played again, with the values that a graph would have.

Like a graph, the tape keeps what plain Python has decided and every plain number; like a graph's, its tensors stay where they
were, and only what they hold is computed anew.  It refuses what a capture refuses: reading a value back.
"""

from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.support.waiting import WAITS


class _Stretch(TorchDispatchMode):
    """Records operations as they are done; refused: prefixes of those that raise RuntimeError."""

    def __init__(self, refused: tuple[str, ...]):
        super().__init__()
        self.refused, self.operations = refused, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if str(func).startswith(self.refused):
            raise RuntimeError(f"{func}: operation not permitted when stream is capturing\nmore of it")
        out = func(*args, **kwargs)
        given = {id(leaf) for leaf in tree_leaves((args, kwargs))}
        storages = {leaf.untyped_storage()._cdata for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        made = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor) and id(leaf) not in given]
        # Views share the memory of what they view.
        views = bool(made) and all(tensor.untyped_storage()._cdata in storages for tensor in made)
        if not views:
            self.operations.append((func, args, kwargs, out))
        return out

    @torch.no_grad()
    def play(self) -> None:
        for func, args, kwargs, out in self.operations:
            for old, new in zip(tree_leaves(out), tree_leaves(func(*args, **kwargs)), strict=True):
                if isinstance(old, Tensor) and old is not new and old.numel():
                    old.copy_(new)


class Tape:
    """A Recorder (mimir_fast/training/step_graph.py) for the CPU.

    refused    prefixes of operations that no capture can hold
    launched   stretches played so far; begun: stretches recorded
    """

    executes = True

    def __init__(self, *refused: str):
        self.refused, self.launched, self.begun = (*WAITS, *refused), 0, 0
        self._stretch: _Stretch | None = None

    def context(self):
        return nullcontext()

    def begin(self) -> None:
        self.begun += 1
        self._stretch = _Stretch(self.refused)
        self._stretch.__enter__()

    def end(self) -> Callable[[], None]:
        stretch, self._stretch = self._stretch, None
        stretch.__exit__(None, None, None)

        def launch() -> None:
            self.launched += 1
            stretch.play()

        return launch

    def abandon(self) -> None:
        if self._stretch is not None:
            self.end()

    def release(self) -> None:
        """The tape goes with what launches it."""
