"""Tasks: the two protocols that pre-training and fine-tuning implement.

`Step` is what the engine calls, `Task` what the loop calls as well.  A task is a plain class with these names and inherits
nothing.  The smallest one is tests/support/toy_task.py.
"""

from collections.abc import Callable, Hashable
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from mimir_fast.checkpoints.run_state import Position
from mimir_fast.config.resolve import Run
from mimir_fast.data import BatchStream
from mimir_fast.models import Classifier, MaskedAutoencoder
from mimir_fast.training.compilation import Compiler
from mimir_fast.training.optimizer import Updater


class Output(Protocol):
    """Results of a step: a NamedTuple of tensors on the device, of which the engine needs the loss."""

    @property
    def loss(self) -> Tensor:
        """Scalar, with its graph; its value may be there only after the backward pass."""
        ...

    @property
    def checked(self) -> Tensor:
        """Scalar that is finite where the loss is, before the backward pass."""
        ...

    def _asdict(self) -> dict[str, Tensor]:
        """All of them by name."""
        ...


class Measured(NamedTuple):
    """Measurements at the end of an epoch: columns of its line in log.txt, and whether the epoch is the best so far."""

    row: dict
    is_best: bool = False


class Step(Protocol):
    """What a micro-step computes.

    run             the resolved configuration, in which the loop fills in the implementations that it measured
    model           the fp32 model, which the engine trains
    average_decay   decay of a running average of the parameters; None: no average is kept
    uncapturable    why a CUDA graph cannot hold `prepare`, `draw_noise` and `step`; "" if it can
    pixels          uint8, or fp32 in [0,1]: the dtype of images that `prepare` converts least
    form            what their operations depend on beside tensors and the run; where it changes, a step is captured anew
    Models, batches, noise and outputs are of types that only the task knows: Any.
    """

    run: Run

    @property
    def model(self) -> MaskedAutoencoder | Classifier: ...

    @property
    def average_decay(self) -> float | None: ...

    @property
    def uncapturable(self) -> str: ...

    @property
    def pixels(self) -> torch.dtype: ...

    @property
    def form(self) -> Hashable: ...

    def updater(self, lr: float) -> Updater:
        """The optimizer in its parameter groups, with the settings of its updates."""
        ...

    def attack_functions(self, compiler: Compiler) -> Any:
        """The functions that the attack computes with, as they are or compiled."""
        ...

    def objective(self, model: Any, compiler: Compiler) -> nn.Module:
        """The module to train: its call is the training forward pass of `model`, which is the task's or a copy of it."""
        ...

    def host_draws(self, images: Tensor, epoch: int, step: int) -> Tensor | None:
        """What the host draws for these images: a tensor in its memory, of one shape for all steps; None: nothing."""
        ...

    def prepare(self, images: Tensor, labels: Tensor, draws: Tensor | None) -> Any:
        """The batch from images [B,3,H,W], uint8 or fp32 in [0,1], labels int64 [B] and the host's draws, all on the device."""
        ...

    def draw_noise(self, generator: torch.Generator, batch: Any) -> Any:
        """All random numbers of the step."""
        ...

    def step(self, objective: nn.Module, attacked: Any, functions: Any, batch: Any, noise: Any) -> Output:
        """Attack and training forward pass, on the device alone: the host does not wait."""
        ...

    def terms(self, output: Any) -> dict[str, Tensor]:
        """A micro-step's own terms of the epoch's sums: scalars on the device."""
        ...

    def scalars(self, output: Any) -> dict[str, Tensor]:
        """An update's own values for the logs: scalars on the device."""
        ...


class Task(Step, Protocol):
    """What a run trains and logs.

    stream    this process's micro-batches; None in a task that is made for its step alone
    tags      TensorBoard's tags of an update -> the keys that they show
    summary   attack, penalty and the like, for the first lines of a run
    """

    @property
    def stream(self) -> BatchStream | None: ...

    @property
    def tags(self) -> dict[str, str]: ...

    @property
    def summary(self) -> str: ...

    def fit(self, state: dict) -> None:
        """Give the model the parameters that only some checkpoints have: those of the one to resume, or, where there is none
        (empty), of the one to start from."""
        ...

    def resume(self, state: dict, own: dict, say: Callable[[str], None]) -> None:
        """Resume from a checkpoint, after its parameters were loaded; own: its `mimir_fast` entry.  Both empty: start."""
        ...

    def state(self) -> dict:
        """Plain values that `resume` needs, for the checkpoint; every process calls it.

        `best`, if it is there, says which epoch best.pth is from.
        """
        ...

    def start_epoch(self, epoch: int) -> None:
        """Set what depends on the epoch."""
        ...

    def end_epoch(self, engine: Any, epoch: int, ends: Callable[[], bool]) -> Measured | None:
        """Measure what is due; None if `ends` returns True before that.

        Raises DataError on every process.  After that, as after None, the run that resumes measures the epoch.
        """
        ...

    def keeps(self, epoch: int) -> bool:
        """Whether the checkpoint of this epoch is kept."""
        ...

    def epoch_row(self, epoch: int, means: dict[str, float], measured: Measured) -> dict:
        """An epoch's own columns of log.txt; means: the epoch's sums, averaged over all processes."""
        ...

    def save_samples(self, folder: Path, position: Position, images: Tensor, output: Any) -> None:
        """Save images of the last step beside a checkpoint; only the main process calls it."""
        ...
