"""Stages: names for the parts of an update, so that they can be timed; without a listener they cost nothing.

data       the next batch: waiting for the loader, and on the device for the copy
prepare    bytes to floats, the step's random numbers
attack     PGD-MAE with its own forward and backward passes
encoder    mask, kept patches, encoder's forward pass
decoder    decoder's forward pass, and the reconstruction loss where both are compiled as one piece
loss       the reconstruction loss, where it is not compiled together with the decoder
penalty    value and gradient of the mutual information; on CUDA on a stream of its own, the images' part beside the
           encoder, the rest beside the decoder and its backward pass
backward   the backward pass of the training loss, with the averaging of gradients over processes
optimizer  gradient norm, AdamW, the 16-bit copy; closes an update
A stage may lie inside of another (the attack's loss).
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch

STAGES = ("data", "prepare", "attack", "encoder", "decoder", "loss", "penalty", "backward", "optimizer")
_opened: Callable[[str], AbstractContextManager] | None = None


def stage(name: str) -> AbstractContextManager:
    """A context called `name`, one of STAGES; in compiled code and without a listener it does nothing."""
    # In this order: compiled code must not depend on the listener, or it would be compiled again for each.
    if torch.compiler.is_compiling() or _opened is None:
        return nullcontext()
    return _opened(name)


def listened() -> bool:
    """Whether somebody listens: a step that is launched as a graph has no stages inside, and is run uncaptured for them."""
    return _opened is not None


@contextmanager
def listening(opened: Callable[[str], AbstractContextManager]) -> Iterator[None]:
    """Context in which every stage of this process enters the context manager opened(name).

    Raises RuntimeError inside of another such context.
    """
    global _opened
    if _opened is not None:
        raise RuntimeError("stages: one listener at a time")
    _opened = opened
    try:
        yield
    finally:
        _opened = None
