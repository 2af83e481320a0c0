"""Captured calls: a function of tensors that is called again and again with the same shapes, launched as a CUDA graph."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mimir_fast.training.step_graph import CaptureError, Recorder, StaticTensors, StepGraph


class CapturedCalls:
    """The function, for work on the device alone: called once as it is, captured at the second call, and then launched.  A
    context manager, whose end gives the memory back.

    Inputs of other shapes than the first call's run as they are.  A launch overwrites the outputs of the one before.
    recorder   what captures; None: every call runs as it is
    say        prints a line, where the function cannot be captured
    """

    def __init__(self, function: Callable[..., Any], recorder: Recorder | None, say: Callable[[str], None] = print):
        self.function, self.say = function, say
        self._graph = StepGraph(recorder) if recorder else None
        self._inputs = StaticTensors()
        self._shapes: list[torch.Size] | None = None

    def __call__(self, *inputs: Tensor) -> Any:
        shapes = [tensor.shape for tensor in inputs]
        first = self._shapes is None
        self._shapes = shapes if self._shapes is None else self._shapes
        if self._graph is None or first or shapes != self._shapes:
            return self.function(*inputs)
        static = self._inputs.put(list(inputs), inputs[0].device)
        try:
            if not self._graph.pieces:
                self._graph.capture("call", partial(self.function, *static))
        except CaptureError as error:
            self.say(f"step_graph: an attack could not be captured ({error}) and runs uncaptured")
            self._graph.release()
            self._graph = None
            return self.function(*inputs)
        return self._graph.launch("call")

    def __enter__(self) -> "CapturedCalls":
        return self

    def __exit__(self, *_: object) -> None:
        if self._graph is not None:
            self._graph.release()
