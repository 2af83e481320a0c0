"""Meters: what a training counts on the device, for its logs; written by the step, read by the loop."""

import torch
from torch import Tensor

from mimir_fast.training.epoch_sums import EpochSums
from mimir_fast.training.metrics_table import MetricsTable
from mimir_fast.training.optimizer import Updater
from mimir_fast.training.task import Output, Step


class Meters:
    """Sums over an epoch's micro-steps, and a row per update.

    sums   over the epoch under way: loss, finite, the task's terms, grad_norm, updates, micro_steps, lr
    rows   of an update: loss, the task's scalars, grad_norm, skipped_steps, skipped_in_a_row (at worst so far)
    """

    def __init__(self, task: Step, updater: Updater, capacity: int):
        device = updater.counters.device
        self.task, self.updater = task, updater
        self.sums, self.rows = EpochSums({}, device), MetricsTable(device, capacity)

    def add(self, output: Output, grad_norm: Tensor | None) -> None:
        """Count a micro-step, and an update if it has a gradient norm.  Work on the device alone."""
        loss, finite = output.loss.detach(), output.loss.isfinite()
        norm = torch.zeros_like(loss) if grad_norm is None else torch.where(grad_norm.isfinite(), grad_norm, 0)
        one = torch.ones_like(loss)
        ours = {"loss": torch.where(finite, loss, 0), "finite": finite}
        counts = {"grad_norm": norm, "updates": one * (grad_norm is not None), "micro_steps": one}
        self.sums.add({**ours, **self.task.terms(output), **counts, "lr": self.updater.lr.to(loss.dtype)})
        if grad_norm is not None:
            skipped = {"skipped_steps": self.updater.counters[0], "skipped_in_a_row": self.updater.counters[2]}
            self.rows.write({"loss": output.loss, **self.task.scalars(output), "grad_norm": grad_norm, **skipped})
