"""torch.compile of the step: which functions, where the results are kept, how long it took."""

import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor, nn

from mimir_fast.attacks.pgd_mae import AttackFunctions
from mimir_fast.kernels._shared.registration import choose
from mimir_fast.models import MaskedAutoencoderViT

BLOCK_GRAPHS = 32  # that one block may have; torch's own limit is 8
CACHE = Path.home() / ".cache" / "mimir_fast" / "inductor"


def keep_compiled_code() -> None:
    """Keep compiled code in the user's cache folder, so that the next run finds it; a folder set by the user stays."""
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(CACHE))


class Compiled:
    """The compiled pieces of a step, or the plain ones.

    encode, reconstruct  the model's, for training; fullgraph, static shapes
    attack               the attack's functions: its loss for the frozen twin; start and step only where they are not one kernel
                         each already
    region "block": one graph per width for the first block, which has nothing to add, one for all others and one for the
    decoder's last, in training and in the attack; quick to compile, less fused
    """

    def __init__(
        self,
        model: MaskedAutoencoderViT,
        twin: MaskedAutoencoderViT,
        compile: bool = True,
        mode: str = "default",
        region: str = "model",
        backend: str | Callable = "inductor",
    ):
        self.encode: Callable[..., Tensor] = model.encode
        self.reconstruct: Callable[..., tuple[Tensor, Tensor]] = model.reconstruct
        self.attack = AttackFunctions()
        options = {"fullgraph": True, "dynamic": False, "mode": mode, "backend": backend}
        if compile and region == "block":
            compile_blocks([b for m in (model, twin) for b in (*m.blocks, *m.decoder_blocks)], **options)
        elif compile:
            self.encode, self.reconstruct = (torch.compile(f, **options) for f in (model.encode, model.reconstruct))
            self.attack = self.attack._replace(loss=torch.compile(self.attack.loss, **options))
        if compile and choose(model.kernels, model.mask_token) == "reference":
            # without CUDA graphs, whose outputs do not outlive their next run: these hand images on from one to the other
            start, step = (
                torch.compile(f, **{**options, "mode": "default"}) for f in (self.attack.start, self.attack.step)
            )
            self.attack = self.attack._replace(start=start, step=step)


def compile_blocks(blocks: Iterable[nn.Module], **options) -> None:
    """Compile blocks one by one; alike ones share a graph.  options: torch.compile's."""
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, BLOCK_GRAPHS)
    for block in blocks:
        block.compile(**options)


class CompileClock:
    """Seconds spent compiling and number of compilations between `start` and `stop`."""

    def __init__(self):
        self.seconds, self.count, self._began = 0.0, 0, 0.0
        self._running = False

    def start(self) -> None:
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
        """Also where it was never started: a trainer may be closed before it runs."""
        if not self._running:
            return
        from torch._dynamo.callback import callback_handler

        self._running = False
        callback_handler.remove_start_callback(self._start)
        callback_handler.remove_end_callback(self._end)
