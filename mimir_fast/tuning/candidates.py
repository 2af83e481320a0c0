"""Candidates: which implementations a problem has on a device, and a problem's inputs, values and times there.

Shapes: B images, T tokens, N heads, M rows, D width, F hidden width.
"""

from collections.abc import Callable
from importlib.util import find_spec

import torch
from torch import Tensor

from mimir_fast.config.resolve import DTYPES
from mimir_fast.kernels import mlp
from mimir_fast.kernels._shared.tiles import Tiles, use_tiles
from mimir_fast.kernels.mlp import op as mlp_op
from mimir_fast.kernels.mlp.tiles import alternatives as mlp_alternatives
from mimir_fast.kernels.short_attention import op as short_op
from mimir_fast.kernels.short_attention import reference
from mimir_fast.kernels.short_attention.tiles import alternatives as short_alternatives
from mimir_fast.models.attention import FEW_TOKENS, PACKAGES, SDPA_BACKENDS, attention
from mimir_fast.models.narrow_attention import WIDEST
from mimir_fast.tuning.budget import beyond_budget
from mimir_fast.tuning.measuring import worst_part
from mimir_fast.tuning.records import Candidate, Choices, Problem
from mimir_fast.tuning.timers import Stopwatch

Function = Callable[..., Tensor]


def candidates_of(problem: Problem, device: torch.device) -> list[Candidate]:
    """What can be tried on a device, in the order in which ties are decided: what is expected to win comes first."""
    if problem.op == "mlp":
        width, hidden = problem.sizes
        if not mlp_op.supported(width, hidden, DTYPES[problem.dtype]):
            return [Candidate("reference")]
        return [*_with_tiles("triton", alternatives(problem, device)), Candidate("reference")]
    tokens, _, head = problem.sizes
    if device.type != "cuda":
        plain = [Candidate("math")] if tokens <= FEW_TOKENS else []
        return [*([Candidate("narrow")] if head <= WIDEST else []), *plain, Candidate("sdpa")]
    found = [
        *map(Candidate, SDPA_BACKENDS),
        *(Candidate(name) for name in PACKAGES if find_spec(name)),
        Candidate("sdpa"),
    ]
    if short_op.supported(tokens, head, DTYPES[problem.dtype]):
        found = _with_tiles("short", alternatives(problem, device)) + found
    return found


def _with_tiles(name: str, tiles: dict[str, dict[str, Tiles]]) -> list[Candidate]:
    return [Candidate(name), *(Candidate(name, own) for own in tiles)]


def alternatives(problem: Problem, device: torch.device) -> dict[str, dict[str, Tiles]]:
    """Named tile sizes of our kernels for a problem: of each of its kernels by the kernel's name."""
    if problem.op == "mlp":
        generation = torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else 0
        width, hidden = problem.sizes
        return mlp_alternatives(width, hidden, generation)
    tokens, _, head = problem.sizes
    return short_alternatives(tokens, head, DTYPES[problem.dtype].itemsize)


def place_tiles(choices: Choices, device: torch.device) -> None:
    """Let our launchers use the tile sizes of these choices, and no others."""
    placed: dict[tuple, Tiles] = {}
    for problem, candidate in choices.items():
        for kernel, tiles in alternatives(problem, device)[candidate.tiles].items() if candidate.tiles else ():
            tokens_or_width, *_, last = problem.sizes
            placed[kernel, tokens_or_width, last, DTYPES[problem.dtype]] = tiles
    use_tiles(placed)


class Workbench:
    """A Bench: one problem with random inputs on a device, and what the reference makes of them, in their dtype and in fp64.

    compiled   makes a function of tensors what the run makes of it: compiles it, or leaves it
    """

    def __init__(
        self, problem: Problem, device: torch.device, stopwatch: Stopwatch, compiled: Callable[[Function], Function]
    ):
        self.problem, self.device, self.stopwatch, self.compiled = problem, device, stopwatch, compiled
        # Not torch's own generator: a run draws the same numbers whether it measures or not.
        generator = torch.Generator(device).manual_seed(0)

        def draw(*shape: int, scale: float = 1.0) -> Tensor:
            values = torch.randn(shape, generator=generator, device=device) * scale
            return values.to(DTYPES[problem.dtype])

        if problem.op == "mlp":
            M, (D, F) = problem.batch, problem.sizes
            self.inputs = [draw(M, D), draw(F, D, scale=D**-0.5), draw(F), draw(D, F, scale=F**-0.5)]
            self.upstream = draw(M, D)
        else:
            T, N, d = problem.sizes
            self.inputs = [draw(problem.batch, T, 3 * N * d)]
            self.upstream = draw(problem.batch, T, N * d)
        # Here and not at a candidate's turn: where there is no memory for it, no candidate is to blame.
        by_reference = self.function(None)
        self.eager, self.truth = self.values(by_reference), self.values(by_reference, torch.float64)
        self._compiled: dict[Candidate, Function] = {}

    def function(self, candidate: Candidate | None) -> Function:
        """The problem as a function of its inputs; None: the reference."""
        name, heads = candidate.name if candidate else "reference", self.problem.sizes[1]
        if self.problem.op == "mlp":
            return lambda x, weight1, bias1, weight2: mlp(x, weight1, bias1, weight2, name)
        if candidate is None:
            return lambda qkv: reference.short_attention(qkv, heads)
        return lambda qkv: attention(qkv, heads, 0, name)

    def values(self, function: Function, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        """Output and gradients by name, computed in a dtype (None: the problem's)."""
        inputs = [t.detach().to(dtype or t.dtype).requires_grad_() for t in self.inputs]
        output = function(*inputs)
        grads = torch.autograd.grad(output, inputs, self.upstream.to(output.dtype))
        return {"output": output.detach()} | {f"gradient {i}": grad for i, grad in enumerate(grads)}

    def wrong(self, candidate: Candidate) -> str:
        place_tiles({self.problem: candidate}, self.device)
        return worst_part(self.values(self._own(candidate)), self.eager, self.truth, beyond_budget)

    def timed(self, candidate: Candidate) -> Callable[[], float]:
        place_tiles({self.problem: candidate}, self.device)
        function = self._own(candidate)
        return self.stopwatch.ready(lambda: self.values(function))

    def _own(self, candidate: Candidate) -> Function:
        """The candidate as the run would call it; compiled once."""
        if candidate not in self._compiled:
            self._compiled[candidate] = self.compiled(self.function(candidate))
        return self._compiled[candidate]
