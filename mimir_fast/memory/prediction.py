"""Peak memory of a training step on one GPU, predicted without one: the real step, run on fake tensors."""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from mimir_fast.config.resolve import Run
from mimir_fast.memory.graphs import planning_backend
from mimir_fast.memory.ledger import KINDS, Ledger, Moment
from mimir_fast.models import Classifier, MaskedAutoencoder
from mimir_fast.models.families import family_of
from mimir_fast.training.distributed import World
from mimir_fast.training.engine import Engine
from mimir_fast.training.finetuning import Finetuning
from mimir_fast.training.precision import ComputeCopy
from mimir_fast.training.pretraining import Pretraining
from mimir_fast.training.train import build_task

CPU = torch.device("cpu")
# Batch sizes of the fake run: primes (see ledger.py), and large, so that few sizes of a model are multiples of one.
PRIMES = (509, 521, 523, 541, 547, 557)
# Encoder blocks traced when compiling: every part of the step grows linearly with them, and tracing all takes longer.
DEPTHS = (1, 2)


class Trace(NamedTuple):
    """A fake step's moments as arrays: segment [n], terms [n,kinds,3], scratch [n,2]."""

    segment: np.ndarray
    terms: np.ndarray
    scratch: np.ndarray

    @classmethod
    def of(cls, moments: list[Moment]) -> "Trace":
        """From a ledger."""
        return cls(*(np.array(column) for column in zip(*moments)))

    def peaks(self, batch: int) -> np.ndarray:
        """[segments,kinds] bytes: the memory in use at each segment's peak."""
        powers = np.array([1, batch, batch**2])
        alive = self.terms @ powers
        # Applied here, at the batch that is asked about: scratch stops growing where the GPU is full.
        alive[:, -1] += np.minimum(self.scratch[:, 0] * batch, self.scratch[:, 1])
        total = alive.sum(axis=1)
        segments = (np.flatnonzero(self.segment == i) for i in range(self.segment.max() + 1))
        return np.stack([alive[rows[total[rows].argmax()]] for rows in segments if len(rows)])


class Prediction(NamedTuple):
    """Memory of a model of `depth` blocks, extrapolated from runs with fewer encoder blocks; from a single run, as it is."""

    traces: list[Trace]
    depths: list[int]
    depth: int

    def at(self, batch: int) -> dict[str, float]:
        """Bytes by kind at the step's peak, at this batch size; raises ValueError if it is below 1."""
        if batch < 1:
            raise ValueError(f"batch_size: got {batch}, expected 1 or more")
        peaks = self.traces[0].peaks(batch)
        if len(self.traces) > 1:
            # Segment by segment: the step's peak may lie elsewhere at another depth.
            slope = (self.traces[1].peaks(batch) - peaks) / (self.depths[1] - self.depths[0])
            peaks = peaks + slope * (self.depth - self.depths[0])
        return dict(zip(KINDS, peaks[peaks.sum(axis=1).argmax()]))


def predict(run: Run) -> Prediction:
    """Follow one step of this pre-training or fine-tuning on CUDA; parallelism and the data pipeline are not part of it.

    Raises ValueError for a configuration that cannot be built.
    """
    with FakeTensorMode():
        model = fake_task(run).model
    trunk = family_of(model).trunk
    depth = len(getattr(model, trunk)) if trunk else 1
    whole = run.compute.compile and run.compute.compile_region == "model"
    depths = list(DEPTHS) if whole and depth > DEPTHS[-1] else [depth]
    return Prediction([follow(run, blocks) for blocks in depths], depths, depth)


def fake_task(run: Run) -> Pretraining | Finetuning:
    """The task, without data, on the CPU; inside of a FakeTensorMode its parameters are fake."""
    with _ConditionsFalse():
        return build_task(run, World(device=CPU))


class _ConditionsFalse(TorchDispatchMode):
    """Dispatch mode in which every condition on a fake tensor's value is false: truncated normal draws branch on one."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return False if func is torch.ops.aten._local_scalar_dense.default else func(*args, **(kwargs or {}))


def follow(run: Run, depth: int) -> Trace:
    """Run the step on fake tensors, after a warm-up, under the ledger; with `depth` encoder blocks where they are alike."""
    torch.compiler.reset()
    with FakeTensorMode():
        task = fake_task(run)
        shorten(task.model, depth)
        ledger = Ledger(_prime(run, task.model))
        engine = Engine(task, task.world, backend=planning_backend(ledger))
        side = run.config.model.input_size
        # This step's; the next one's, which the prefetcher copies meanwhile; and where a captured step reads its own.
        count = 3 if run.compute.step_graph and not task.uncapturable else 2
        ahead = [torch.empty(ledger.batch, 3, side, side, dtype=torch.uint8) for _ in range(count)]
        _warm_up(engine, ahead[0])
        ledger.start()
        ledger.hold(_parameters(engine), "parameters")
        moments = engine.updater.optimizer.state.values()
        ledger.hold((t for state in moments for t in state.values()), "optimizer state")
        ledger.hold(ahead, "uint8 images")
        with ledger:
            _update(engine, ahead[0])
    torch.compiler.reset()
    return Trace.of(ledger.moments)


def shorten(model: MaskedAutoencoder | Classifier, depth: int) -> None:
    """Keep the encoder's last blocks, which a classifier's stochastic depth leaves out the most."""
    if not (trunk := family_of(model).trunk):
        return
    blocks = getattr(model, trunk)
    setattr(model, trunk, blocks[len(blocks) - depth :])
    if isinstance(model, Classifier) and any(model.drop_rates):
        model.drop_rates, model.rates = model.drop_rates[-depth:], model.get_buffer("rates")[-depth:]


def _prime(run: Run, model: MaskedAutoencoder | Classifier) -> int:
    """A batch size that divides no other size of the step."""
    flags, L = run.flat(), model.num_patches
    kept = [int(L * (1 - flags[name])) for name in ("mask_ratio", "attack_mask_ratio") if name in flags]
    sizes = {L, L + 1, flags["input_size"], *kept, *(K + 1 for K in kept), *(L - K for K in kept)}
    sizes |= {n for p in model.parameters() for n in p.shape}
    return next(prime for prime in PRIMES if all(n % prime for n in sizes))


def _parameters(engine: Engine) -> list[Tensor]:
    """The parameters, the 16-bit copies if there are any, and the running average if one is kept."""
    compute, average = engine.updater.compute, engine.average
    models = [engine.task.model, *([average.module] if average else [])]
    own = [t for model in models for t in (*model.parameters(), *model.buffers())]
    return [*own, *(compute.copies if isinstance(compute, ComputeCopy) else [])]


def _warm_up(engine: Engine, images_u8: Tensor) -> None:
    """Compile what will be compiled, and make the optimizer's state: an eager step needs no more than an update for it."""
    if engine.task.run.compute.compile:
        return _update(engine, images_u8)
    for p in engine.task.model.parameters():
        p.grad = torch.empty_like(p) if p.requires_grad else None
    engine.update()


def _update(engine: Engine, images_u8: Tensor) -> None:
    """The micro-steps and the update, as the training loop makes them."""
    labels = torch.empty(len(images_u8), dtype=torch.int64)
    # From the second micro-step on, gradients are there from the start: more of them are alike.
    count = min(engine.accum_iter, 2)
    for i in range(count):
        # Let go of the last one's first, as the loop does.
        output = None
        output = engine.micro_step(images_u8, labels, step=i, last=i + 1 == count)  # noqa: F841 (kept until the next one)
    engine.update()
