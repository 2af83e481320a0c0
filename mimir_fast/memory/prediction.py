"""Peak memory of a pre-training step on one GPU, predicted without one: the real step, run on fake tensors."""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from mimir_fast.config.pretraining import PretrainConfig
from mimir_fast.memory.graphs import planning_backend
from mimir_fast.memory.ledger import KINDS, Ledger, Moment
from mimir_fast.models import MaskedAutoencoderViT
from mimir_fast.training.distributed import World
from mimir_fast.training.optimizer import Updater, build_optimizer
from mimir_fast.training.precision import AUTOCAST
from mimir_fast.training.pretrain_step import draw_noise, pretrain_step
from mimir_fast.training.pretraining import build_attack, build_computation, build_model

PRIMES = (509, 521, 523, 541, 547, 557)
DEPTHS = (1, 2)  # encoder blocks traced when compiling: every stretch of the step grows linearly with the blocks


class Run(NamedTuple):
    """A fake step's moments as arrays: segment [n], terms [n,kinds,3], scratch [n,2]."""

    segment: np.ndarray
    terms: np.ndarray
    scratch: np.ndarray

    @classmethod
    def of(cls, moments: list[Moment]) -> "Run":
        """From a ledger."""
        return cls(*(np.array(column) for column in zip(*moments)))

    def peaks(self, batch: int) -> np.ndarray:
        """[segments,kinds] bytes: what was alive when each segment stood highest."""
        powers = np.array([1, batch, batch**2])
        alive = self.terms @ powers
        alive[:, -1] += np.minimum(self.scratch[:, 0] * batch, self.scratch[:, 1])
        total = alive.sum(axis=1)
        segments = (np.flatnonzero(self.segment == i) for i in range(self.segment.max() + 1))
        return np.stack([alive[rows[total[rows].argmax()]] for rows in segments if len(rows)])


class Prediction(NamedTuple):
    """What runs of fewer encoder blocks say about a model of `depth` blocks; a single run stands for itself."""

    runs: list[Run]
    depths: list[int]
    depth: int

    def at(self, batch: int) -> dict[str, float]:
        """Bytes by kind at the step's peak, at this batch size; raises ValueError if it is below 1."""
        if batch < 1:
            raise ValueError(f"batch_size: got {batch}, expected 1 or more")
        peaks = self.runs[0].peaks(batch)
        if len(self.runs) > 1:
            slope = (self.runs[1].peaks(batch) - peaks) / (self.depths[1] - self.depths[0])
            peaks = peaks + slope * (self.depth - self.depths[0])
        return dict(zip(KINDS, peaks[peaks.sum(axis=1).argmax()]))


def predict(config: PretrainConfig) -> Prediction:
    """Follow one step of this configuration on CUDA; precision, compile, kernels and attention must be settled.

    Data parallelism and the data pipeline are not part of it.  Raises ValueError for a configuration that cannot be built.
    """
    with torch.device("meta"):
        depth = len(build_model(config, torch.device("meta")).blocks)
    whole = config.compute.compile and config.compute.compile_region == "model"
    depths = list(DEPTHS) if whole and depth > DEPTHS[-1] else [depth]
    return Prediction([follow(config, blocks) for blocks in depths], depths, depth)


def follow(config: PretrainConfig, depth: int) -> Run:
    """Run the step with `depth` encoder blocks on fake tensors, after a warm-up, under the ledger."""
    with torch.device("meta"):
        model = build_model(config, torch.device("meta"))
    model.blocks = model.blocks[:depth]
    ledger = Ledger(_prime(config, model))
    torch.compiler.reset()
    with FakeTensorMode():
        _fill(model)
        step = _Step(config, model, ledger)
        step.warm_up()
        ledger.start()
        ledger.hold(step.parameters(), "parameters")
        ledger.hold((t for state in step.updater.optimizer.state.values() for t in state.values()), "optimizer state")
        side = config.model.input_size
        ahead = [
            torch.empty(ledger.batch, 3, side, side, dtype=torch.uint8) for _ in range(2)
        ]  # this step's, the next one's
        ledger.hold(ahead, "uint8 images")
        with ledger:
            step()
    torch.compiler.reset()
    return Run.of(ledger.moments)


def _prime(config: PretrainConfig, model: MaskedAutoencoderViT) -> int:
    """A batch size that divides no other size of the step."""
    L = model.num_patches
    ratios = (config.model.mask_ratio, config.attack.attack_mask_ratio)
    kept = [int(L * (1 - ratio)) for ratio in ratios]
    sizes = {L, L + 1, config.model.input_size, *kept, *(K + 1 for K in kept), *(L - K for K in kept)}
    sizes |= {n for p in model.parameters() for n in p.shape}
    return next(prime for prime in PRIMES if all(n % prime for n in sizes))


def _fill(model: nn.Module) -> None:
    """Give a model on the meta device fake CPU parameters."""
    for module in model.modules():
        for name, p in module.named_parameters(recurse=False):
            fake = nn.Parameter(torch.empty(p.shape, dtype=p.dtype), requires_grad=p.requires_grad)
            setattr(module, name, fake)


class _Step:
    """The trainer's micro-steps and update, without data and logs."""

    def __init__(self, config: PretrainConfig, model: MaskedAutoencoderViT, ledger: Ledger):
        self.config, self.model, self.batch = config, model, ledger.batch
        cpu = torch.device("cpu")
        self.attack, self.dtype = build_attack(config, None, cpu), AUTOCAST[config.compute.precision]
        optimizer = build_optimizer(model, 1e-3, config.optim.weight_decay)
        self.updater = Updater(optimizer, cpu, config.compute.precision == "fp16")
        backend = planning_backend(ledger)
        self.computation = build_computation(config, World(device=cpu), model, self.updater, backend)

    def parameters(self) -> list[Tensor]:
        """The parameters, and the 16-bit copies if there are any."""
        copies = self.updater.compute.copies if self.updater.compute else []
        return [*self.model.parameters(), *self.model.buffers(), *copies]

    def warm_up(self) -> None:
        """Compile what will be compiled, and make the optimizer's state: an eager step needs no more than an update for it."""
        if self.config.compute.compile:
            return self()
        for p in self.model.parameters():
            p.grad = torch.empty_like(p) if p.requires_grad else None
        self.updater.update()

    def __call__(self) -> None:
        for _ in range(min(self.config.optim.accum_iter, 2)):  # from the second on, gradients are there from the start
            self._micro_step()
        self.updater.update()

    def _micro_step(self) -> None:
        side = self.config.model.input_size
        images: Tensor = torch.empty(self.batch, 3, side, side)
        noise = draw_noise(torch.Generator(), self.batch, self.model.num_patches, self.attack)
        objective, attacked, functions, _ = self.computation
        with torch.autocast("cpu", self.dtype, enabled=self.dtype != torch.float32):
            output = pretrain_step(objective, attacked, images, noise, self.attack, functions)
        self.updater.backward(output.loss, self.config.optim.accum_iter)
