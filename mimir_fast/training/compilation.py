"""torch.compile of the step: which functions are compiled, where compiled code is kept, how long it took."""

import time
from collections.abc import Callable

import torch
from torch import nn

from mimir_fast.kernels._shared.direct import write_direct_calls
from mimir_fast.models.families import family_of

# Modes that run CUDA graphs of their own -> the same without them.
WITHOUT_GRAPHS = {"reduce-overhead": "default", "max-autotune": "max-autotune-no-cudagraphs"}
# Why a step is not captured on CPUs, where no mode runs CUDA graphs either.
ON_CPU = "on cpu"
# Graphs that one block may have; torch's own limit is 8.
BLOCK_GRAPHS = 32

# Inductor checks sizes, strides and addresses of every operator's results in each step.  Our operators' are tested.
OWN_OPTIONS = {"size_asserts": False, "alignment_asserts": False}


class Compiler:
    """torch.compile as a run asks for it: fullgraph, static shapes; the whole model, block by block, or nothing.

    on          whether anything is compiled
    region      model or block.  By block there is one graph per width for the first block, which has no branch to add, and one
                for all others: quick to compile, less fused
    reference   whether our operations are eager PyTorch, and not kernels of ours already
    through     with shards: f -> a function with f's arguments that gathers the parameters of the model it is called with
    """

    def __init__(
        self,
        on: bool = True,
        mode: str = "default",
        region: str = "model",
        backend: str | Callable = "inductor",
        reference: bool = True,
        through: Callable[[Callable], Callable] | None = None,
    ):
        self.on, self.by_block, self.reference, self.through = on, region == "block", reference, through
        self.mode, self.backend = mode, backend
        self.options: dict = {}
        if on and not reference and backend == "inductor":
            self.options = OWN_OPTIONS
            write_direct_calls()

    def _how(self, mode: str) -> dict:
        """The arguments of torch.compile, which takes a mode or options."""
        if self.options:
            return {"backend": self.backend, "options": torch._inductor.list_mode_options(mode) | self.options}
        return {"backend": self.backend, "mode": mode}

    def _compile(self, function: Callable, mode: str) -> Callable:
        return torch.compile(function, fullgraph=True, dynamic=False, **self._how(mode))

    def trained(self, function: Callable) -> Callable:
        """A part of the training pass, compiled as one graph unless blocks are compiled."""
        return self._compile(function, self.mode) if self.on and not self.by_block else function

    def attacked(self, function: Callable) -> Callable:
        """A part of the attack, function(model, *inputs), compiled like a part of the training pass.

        Its model should have no trainable parameters: a compiled function computes every gradient that could be asked for.
        """
        return self.through(function) if self.through else self.trained(function)

    def pixels(self, function: Callable) -> Callable:
        """A function that moves images, compiled."""
        # Without CUDA graphs, whose outputs do not outlive their next run: each step of an attack starts from the last.
        return self._compile(function, "default") if self.on else function

    def operation(self, function: Callable) -> Callable:
        """One of our operations on images, compiled where it is the reference; elsewhere it is one kernel already."""
        return self.pixels(function) if self.reference else function

    def blocks(self, model: nn.Module) -> None:
        """Compile a model's blocks one by one, if the region is block; blocks of one shape share a graph."""
        if not self.on or not self.by_block:
            return
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, BLOCK_GRAPHS)
        for block in blocks_of(model):
            block.compile(fullgraph=True, dynamic=False, **self._how(self.mode))


def mode_inside(mode: str, uncaptured: str, accum_iter: int) -> str:
    """The mode for what is compiled inside of a step; uncaptured: why the step itself is not captured, "" if it is.

    Raises ValueError where the mode's own graphs would overwrite gradients that are being accumulated.
    """
    # One graph holds the whole step: inside of it there are no others.
    if not uncaptured:
        return WITHOUT_GRAPHS.get(mode, mode)
    if mode in WITHOUT_GRAPHS and accum_iter > 1 and uncaptured != ON_CPU:
        raise ValueError(
            f"compile_mode: {mode} keeps one micro-batch's gradients, not those of --accum_iter {accum_iter}, where the step "
            f"is not captured ({uncaptured}); pass --compile_mode {WITHOUT_GRAPHS[mode]}"
        )
    return mode


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """The Transformer blocks of a model, in its order."""
    kinds = family_of(model).blocks
    return [module for module in model.modules() if isinstance(module, kinds)]


class CompileClock:
    """Seconds spent compiling and number of compilations between `start` and `stop`."""

    def __init__(self):
        self.seconds, self.count, self._began = 0.0, 0, 0.0
        self._running = False

    def start(self) -> None:
        """Begin to listen to Dynamo."""
        # Importing Dynamo takes a second.
        from torch._dynamo.callback import callback_handler

        callback_handler.register_start_callback(self._start)
        callback_handler.register_end_callback(self._end)
        self._running = True

    def _start(self, _args) -> None:
        self._began = time.perf_counter()

    def _end(self, _args) -> None:
        self.seconds += time.perf_counter() - self._began
        self.count += 1

    def stop(self) -> None:
        """Stop listening, if it ever began: a loop may be closed before it runs."""
        if not self._running:
            return
        from torch._dynamo.callback import callback_handler

        self._running = False
        callback_handler.remove_start_callback(self._start)
        callback_handler.remove_end_callback(self._end)
