"""Optimizer: parameter groups, learning-rate schedule, and updates that skip non-finite steps on the device."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from mimir_fast.config.choices import AFTER_WARMUP
from mimir_fast.config.sections import OptimConfig
from mimir_fast.training.stages import stage

if TYPE_CHECKING:
    from mimir_fast.training.precision import ComputeCopy
    from mimir_fast.training.sharding import Shards

# MAE's; fine-tuning has 0.999 (layer_decay.py).
BETAS = (0.9, 0.95)
ADAM_EPS = 1e-8


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Two groups in the original's order: vectors and biases without decay, then everything else.

    Tokens are 3-D and therefore decayed; frozen tables are in no group.  Inside a group, `named_parameters()` order.
    """
    plain: list[nn.Parameter] = []
    decayed: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            # The rule of timm's param_groups_weight_decay: the order of moments in a checkpoint follows from it.
            (plain if parameter.ndim <= 1 or name.endswith(".bias") else decayed).append(parameter)
    return [{"params": plain, "weight_decay": 0.0}, {"params": decayed, "weight_decay": weight_decay}]


def build_optimizer(model: nn.Module, lr: float, weight_decay: float) -> torch.optim.AdamW:
    """AdamW over `parameter_groups`."""
    # Fused: it can skip a step by a flag on the device.
    return torch.optim.AdamW(parameter_groups(model, weight_decay), lr=lr, betas=BETAS, eps=ADAM_EPS, fused=True)


def peak_learning_rate(optim: OptimConfig, processes: int) -> float:
    """Peak learning rate: --lr, or --blr per 256 images of an update."""
    # Linear scaling: Goyal et al., Accurate, Large Minibatch SGD, 2017.
    return optim.lr if optim.lr is not None else optim.blr * optim.batch_size * optim.accum_iter * processes / 256


def scheduled_rate(epoch: float, lr: float, o: OptimConfig) -> float:
    """The learning rate at `epoch`, which may be a fraction, of a run with peak rate lr."""
    return learning_rate(epoch, lr, o.min_lr, o.warmup_epochs, o.epochs, o.lr_at_start, o.cosine_from)


def learning_rate(
    epoch: float,
    lr: float,
    min_lr: float,
    warmup_epochs: float,
    epochs: float,
    lr_at_start: float = 0.0,
    cosine_from: str = AFTER_WARMUP,
) -> float:
    """Learning-rate schedule: linear warm-up from lr_at_start, then half a cosine down to min_lr; `epoch` may be a fraction.

    cosine_from   warmup: from lr at the warm-up's end; start: from lr in epoch 0, hidden by the warm-up
    """
    if epoch < warmup_epochs:
        return lr_at_start + (lr - lr_at_start) * epoch / warmup_epochs
    begins = warmup_epochs if cosine_from == AFTER_WARMUP else 0
    if epochs <= begins:
        return min_lr
    progress = (epoch - begins) / (epochs - begins)
    return min_lr + (lr - min_lr) * 0.5 * (1 + math.cos(math.pi * progress))


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set every group's learning rate: lr, times the group's `lr_scale` if it has one."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)


class Updater:
    """Backward passes and optimizer updates of one model.

    A non-finite loss makes every gradient NaN, on all ranks once gradients are averaged; a non-finite gradient norm then
    skips the update on the device.  Everything that an update reads or writes stays at its address, so that a CUDA graph can
    hold it; `place` is the host's part.
    lr           learning rate before the groups' scales, scalar on the device
    counters     [3] int64 on the device: updates skipped in all, in a row now, in a row at worst
    scaler       torch's GradScaler for fp16; in bf16 and fp32 it is disabled and its state empty
    compute      what computes in place of the parameters: a 16-bit copy, shards, or None
    total_norm   gradients -> their global L2 norm
    max_norm     gradients of a larger norm are scaled down to it; None: never
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        device: torch.device,
        fp16: bool,
        compute: "ComputeCopy | Shards | None" = None,
        max_norm: float | None = None,
    ):
        self.optimizer, self.compute, self.max_norm = optimizer, compute, max_norm
        self.total_norm: Callable[[list[Tensor]], Tensor] = torch.nn.utils.get_total_norm
        self.scaler = torch.amp.GradScaler(device.type, enabled=fp16)
        self.counters = torch.zeros(3, dtype=torch.int64, device=device)
        # The fused kernel reads a learning rate from CUDA memory in fp32 only.
        dtype = torch.float32 if device.type == "cuda" else torch.float64
        self._numbers = torch.zeros(1 + len(optimizer.param_groups), dtype=dtype, device=device)
        self._placed: list[float] = []
        self.lr, self._asked = self._numbers[0], 0.0

    def set_learning_rate(self, lr: float) -> None:
        """Set every group's learning rate, for the updates after the next `place`."""
        set_learning_rate(self.optimizer, lr)
        self._asked = lr

    def place(self) -> None:
        """Copy the learning rates to the device, without a wait: what an update needs of the host."""
        numbers = [self._asked, *(group["lr"] for group in self.optimizer.param_groups)]
        if numbers != self._placed:
            device = self._numbers.device
            host = torch.tensor(numbers, dtype=self._numbers.dtype, pin_memory=device.type == "cuda")
            self._numbers.copy_(host, non_blocking=True)
            self._placed = numbers

    def backward(self, loss: Tensor, accum_iter: int, checked: Tensor | None = None) -> None:
        """Accumulate the gradients of one micro-batch's loss / accum_iter.

        checked   the scalar that tells whether the loss is finite; None: the loss
        """
        with stage("backward"):
            checked = (loss if checked is None else checked).detach()
            # Autograd does not give NaN for every non-finite loss: a loss of infinity can have gradients of zero.
            poison = torch.where(checked.isfinite(), 1.0, torch.nan).to(loss.dtype)
            # The loss's value is not read: it may still be computed.
            loss.backward(self.scaler.scale(poison) / accum_iter)
            if self.compute:
                self.compute.take_gradients()

    def update(self) -> Tensor:
        """Step the optimizer, clear the gradients; returns their global L2 norm before clipping (device scalar, unscaled)."""
        with stage("optimizer"):
            return self._update()

    def _update(self) -> Tensor:
        self.place()
        self.scaler.unscale_(self.optimizer)
        trained = [p for group in self.optimizer.param_groups for p in group["params"] if p.grad is not None]
        norm = self.total_norm([p.grad for p in trained])
        if self.max_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(trained, self.max_norm, norm)
        bad = ~norm.isfinite()
        with self._rates_on_device():
            if self.scaler.is_enabled():
                self.scaler.step(self.optimizer)
                self.scaler.update()
            else:
                # The flag of the fused kernel, which GradScaler sets in the same way.  torch declares it nowhere.
                self.optimizer.grad_scale = None  # type: ignore[attr-defined]
                self.optimizer.found_inf = bad.float()  # type: ignore[attr-defined]
                self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.compute:
            self.compute.refresh()
        self._count(bad)
        return norm

    @contextmanager
    def _rates_on_device(self) -> Iterator[None]:
        """Context in which the optimizer reads its learning rates from the device."""
        # For the step alone: everywhere else, and in checkpoints, they are plain numbers.
        groups = self.optimizer.param_groups
        kept: list[dict] = [{name: group[name] for name in ("lr", "capturable") if name in group} for group in groups]
        for group, rate in zip(groups, self._numbers[1:].unbind()):
            group["lr"] = rate
            if "capturable" in group:
                group["capturable"] = True
        try:
            yield
        finally:
            for group, plain in zip(groups, kept):
                group.update(plain)

    def _count(self, bad: Tensor) -> None:
        total, in_a_row, worst = self.counters.unbind()
        in_a_row = (in_a_row + 1) * bad
        self.counters.copy_(torch.stack([total + bad, in_a_row, torch.maximum(worst, in_a_row)]))
