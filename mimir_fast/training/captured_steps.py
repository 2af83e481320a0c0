"""Captured steps: when micro-steps run as they are, when they are captured, and what happens where they cannot be.

The first WARM_UP updates are ordinary training steps; the micro-steps of the next are captured as they come (first, later,
last of an update), and launched from then on.
"""

from collections.abc import Callable, Hashable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from mimir_fast.training import stages
from mimir_fast.training.distributed import World
from mimir_fast.training.step_graph import WARM_UP, CaptureError, Recorder, StaticTensors, StepGraph

Micro = Callable[[list[Tensor]], Any]
# Images whose results are kept of a micro-step that no update follows: enough for samples beside a checkpoint.
KEPT = 8


class CapturedSteps:
    """The micro-steps of one training, as CUDA graphs.

    reason   why they run uncaptured; "" where they are captured
    say      prints a line
    """

    def __init__(self, recorder: Recorder | None, world: World, parameters: list[Tensor], reason: str = ""):
        self.recorder, self.world, self.parameters = recorder, world, parameters
        self.reason = reason if recorder is None else ""
        self.say: Callable[[str], None] = print
        self._graph = StepGraph(recorder) if recorder else None
        self._inputs = StaticTensors()
        self._form: Hashable = None
        # Updates in this form so far; whether the update under way is captured; whether all of its micro-steps are.
        self._warm, self._now, self._whole = 0, False, False

    def run(self, inputs: list[Tensor], form: Hashable, first: bool, last: bool, seed: Callable[[], None], work: Micro):
        """Do or launch a micro-step; returns its output, which stays where it is until the next one.

        inputs        tensors of the batch, in host memory or on the device
        form          what the work depends on beside tensors
        first, last   whether it begins and ends an update
        seed          sets the random numbers of the step
        work          inputs on the device -> output
        """
        if first:
            self._choose(form)
        if not self._now or self._graph is None:
            seed()
            self._warm += last
            return work([tensor.to(self.world.device, non_blocking=True) for tensor in inputs])
        key, static = (first, last), self._inputs.put(inputs, self.world.device)
        while key not in self._graph.pieces:
            seed()
            if not self._capture(key, lambda: work(static) if last else _first_rows(work(static))):
                seed()
                return work(static)
        seed()
        self._whole |= last
        return self._graph.launch(key)

    def place(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Where the first input of the next micro-step, of this shape, is best written: it is then not copied."""
        return self._inputs.place(shape, self.world.device, dtype)

    def context(self) -> AbstractContextManager:
        """Context in which the training must run."""
        return self.recorder.context() if self.recorder else nullcontext()

    def release(self) -> None:
        """Give the graphs' memory back, for work between two updates that needs it; the next update is captured again."""
        if self._graph is not None:
            self._graph.release()
            self._whole = False
            self._inputs.release()

    def _choose(self, form: Hashable) -> None:
        """Decide about the update that begins."""
        if self._graph is None:
            return
        if form != self._form:
            self._form, self._warm = form, 0
        listened = stages.listened()
        # Graphs of an update that an epoch's end cut off do not fit together.
        if self._graph.pieces and (not self._warm or listened or not self._whole):
            self.release()
        self._now = self._warm >= WARM_UP and not listened

    def _capture(self, key: Hashable, work: Callable[[], object]) -> bool:
        """Whether a micro-step was captured, or may be tried again, on all processes."""
        assert self._graph is not None
        gradients = [p.grad for p in self.parameters]
        why = ""
        try:
            self._graph.capture(key, work)
        except CaptureError as error:
            why = str(error)
        # All or none: where one process launches graphs and another does not, their collectives would not meet.
        if not self.world.any(bool(why)):
            return True
        why = why or "it failed in another process"
        for p, gradient in zip(self.parameters, gradients):
            p.grad = gradient
        self._graph.pieces.pop(key, None)
        if more := self._graph.leave_more():
            self.say(
                f"step_graph: the step could not be captured ({why}); the {', '.join(more)} runs between two graphs"
            )
            return True
        self.say(
            f"step_graph: the step could not be captured ({why}) and runs uncaptured; --step_graph off avoids the try"
        )
        self.reason, self._now = f"its capture failed: {why}", False
        self._graph.release()
        self._graph = None
        return False


def _first_rows(output: Any) -> Any:
    """The first images' results: whole batches of each kind of micro-step would take memory for nothing."""
    return tree_map_only(Tensor, lambda tensor: tensor[:KEPT].clone() if tensor.ndim else tensor, output)
