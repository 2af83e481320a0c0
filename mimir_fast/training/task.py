"""What a training is about: the two contracts that pre-training and fine-tuning fill in.

`Step` is what the engine asks, `Task` is what the loop asks on top of it.  A task is a plain class with these names; nothing is
inherited.  tests/support/toy_task.py is the smallest one.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from mimir_fast.checkpoints.run_state import Position
from mimir_fast.config.resolve import Run
from mimir_fast.data import BatchStream
from mimir_fast.training.compilation import Compiler
from mimir_fast.training.optimizer import Updater


class Output(Protocol):
    """A step's device tensors; the engine needs the loss alone."""

    loss: Tensor


class Measured(NamedTuple):
    """What the end of an epoch found: columns of its line in log.txt, and whether the epoch is the best so far."""

    row: dict
    is_best: bool = False


class Step(Protocol):
    """What a micro-step computes.

    run            what was asked, and how it is computed here
    model          the fp32 model; the engine trains it
    average_decay  share of a running average that stays at an update; None: no average is kept
    """

    run: Run
    model: nn.Module
    average_decay: float | None

    def updater(self, lr: float) -> Updater:
        """The optimizer in its parameter groups, with what belongs to its updates."""

    def attack_functions(self, compiler: Compiler) -> Any:
        """What the attack computes with, plain or compiled."""

    def objective(self, model: nn.Module, compiler: Compiler) -> nn.Module:
        """The module to train: its call is the training forward pass of `model`, a copy of ours or ours itself."""

    def prepare(self, images_u8: Tensor, labels: Tensor, epoch: int, step: int) -> Any:
        """images uint8 [B,3,H,W] and labels int64 [B], on the device -> what `step` gets.  May ask the host."""

    def draw_noise(self, generator: torch.Generator, batch: Any) -> Any:
        """Every random number of the step."""

    def step(self, objective: nn.Module, attacked: nn.Module, functions: Any, batch: Any, noise: Any) -> Output:
        """Attack and training forward pass, on the device alone: the host is not asked."""


class Task(Step, Protocol):
    """What is trained, on which data, and what is told about it.

    stream   this process's micro-batches
    tags     TensorBoard's tags of an update, and the keys they show
    summary  attack, penalty, ...: words for the first lines of a run
    """

    stream: BatchStream
    tags: dict[str, str]
    summary: str

    def resume(self, state: dict, own: dict, say: Callable[[str], None]) -> None:
        """Go on from a checkpoint whose parameters are loaded already; own: its `mimir_fast` entry.  Both empty: start."""

    def state(self) -> dict:
        """Plain values that `resume` needs, for the checkpoint; every process calls it.

        `best`, if it is there, says which epoch best.pth is from.
        """

    def start_epoch(self, epoch: int) -> None:
        """What depends on the number of the epoch."""

    def end_epoch(self, engine: Any, epoch: int, ends: Callable[[], bool]) -> Measured | None:
        """Measure what is due; None if `ends` says that a signal asks to end before that.

        Raises DataError on every process; like None, it leaves the epoch to be measured by the run that goes on.
        """

    def keeps(self, epoch: int) -> bool:
        """Whether the checkpoint of this epoch stays."""

    def terms(self, output: Output) -> dict[str, Tensor]:
        """A micro-step's own contributions to the epoch's sums: device scalars."""

    def scalars(self, output: Output) -> dict[str, Tensor]:
        """An update's own numbers for the logs: device scalars."""

    def epoch_row(self, epoch: int, means: dict[str, float], measured: Measured) -> dict:
        """An epoch's own columns of log.txt; means: of the epoch's sums over all processes."""

    def save_samples(self, folder: Path, position: Position, images_u8: Tensor, output: Output) -> None:
        """Whatever shows the last step, to lie beside a checkpoint; the main process calls it."""
