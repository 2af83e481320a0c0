"""Ledger of a step's memory on fake tensors: sizes as functions of the batch.

The fake run has a prime number of images, so that a size shows how it grows: with the batch if the prime divides it, with the
batch squared if it does so twice.  One run then predicts every batch.  Tensors are fake CPU tensors, because autograd refuses
fake CUDA tensors where there is no GPU; where CUDA differs, operators are replaced (mimir_fast/memory/cuda.py).
"""

import weakref
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mimir_fast.memory.cuda import ON_CUDA, Scratch, scratch_of

KINDS = ("parameters", "optimizer state", "uint8 images", "activations and gradients")
# Bytes; CUDA's caching allocator hands out multiples of this.
ALLOCATION = 512


class Moment(NamedTuple):
    """Memory in use at one moment: terms [kinds,3] in bytes (constant, per image, per image^2), and scratch besides."""

    segment: int
    terms: np.ndarray
    scratch: Scratch


def growth(size: int, batch: int) -> np.ndarray:
    """[constant, per image, per image^2] bytes of something that takes `size` bytes at the prime `batch`."""
    power = 0
    while size and power < 2 and size % batch == 0:
        size, power = size // batch, power + 1
    terms = np.zeros(3)
    # Rounded up to whole allocations only where the size is fixed: of a multiple of the batch the rounding is not
    # linear.
    terms[power] = size if power else -(-size // ALLOCATION) * ALLOCATION
    return terms


def tensor_growth(tensor: Tensor, batch: int) -> np.ndarray:
    """`growth` of a tensor's storage."""
    # A storage can end before the last image's stride does, as that of a slice: it counts as if it did not.
    size = tensor.untyped_storage().nbytes()
    rows = [tensor.stride(i) * n for i, n in enumerate(tensor.shape) if n % batch == 0]
    whole = max(rows, default=0) * tensor.element_size()
    return growth(whole if 0 < whole - size < whole // batch else size, batch)


class Ledger(TorchDispatchMode):
    """Dispatch mode that follows every storage that is alive, inside a FakeTensorMode.

    batch      the prime number of images in the fake run
    moments    memory in use after every operation
    segment    number of the part of the step that new moments belong to
    """

    def __init__(self, batch: int):
        super().__init__()
        self.batch, self.alive = batch, np.zeros((len(KINDS), 3))
        self.held: dict[int, tuple[str, np.ndarray]] = {}
        self.moments: list[Moment] = []
        self.segment = 0

    @classmethod
    def is_infra_mode(cls) -> bool:
        """True, so that compiled functions run under this mode as they do without it."""
        return True

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        func = ON_CUDA.get(func, func)
        out = func(*args, **kwargs)
        self.hold(leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor))
        self.note(scratch=scratch_of(func, self.batch, *args, **kwargs))
        return out

    def start(self) -> None:
        """Forget everything and start over."""
        self.held.clear()
        self.moments.clear()
        self.alive[:], self.segment = 0, 0

    def hold(self, tensors: Iterable[Tensor], kind: str = KINDS[-1]) -> None:
        """Count the storages of these tensors until they are freed, or as another kind from now on."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            # The address of the C++ object: Python objects around one storage come and go.
            key = storage._cdata
            if key not in self.held:
                # A storage is followed and not a tensor: views share it, and it lives as long as the last of them.
                weakref.finalize(storage, self._release, key)
            elif kind == KINDS[-1]:
                continue
            self._release(key)
            self.held[key] = (kind, tensor_growth(tensor, self.batch))
            self.alive[KINDS.index(kind)] += self.held[key][1]

    def _release(self, key: int) -> None:
        if key in self.held:
            kind, terms = self.held.pop(key)
            self.alive[KINDS.index(kind)] -= terms

    def note(self, more=0.0, scratch: Scratch | None = None) -> None:
        """Record a moment: the memory in use, and `more` temporaries that are no tensors, [3] bytes."""
        terms = self.alive.copy()
        terms[-1] += more
        self.moments.append(Moment(self.segment, terms, scratch or Scratch()))
