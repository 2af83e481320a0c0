"""Exponential moving average (EMA) of the parameters, `--model_ema`, kept on the device."""

import copy

import torch
from torch import Tensor, nn

from mimir_fast.training.running_statistics import running_statistics


class ParameterEMA:
    """average <- d * average + (1 - d) * parameters, after every optimizer update.

    module       a frozen copy of the model that holds the average, for validation and checkpoints
    decay        d, but at most (1 + n) / (10 + n) at update n, so that short runs forget their initialisation
    Running statistics of batch normalisation are averaged like parameters, which they describe; all other buffers, integers
    among them, are the model's own: an average would corrupt them.
    Make it after the processes agreed on the parameters.  Raises ValueError unless 0 <= decay < 1.
    """

    def __init__(self, model: nn.Module, decay: float):
        if not 0 <= decay < 1:
            raise ValueError(f"model_ema_decay: expected 0 <= decay < 1, got {decay}")
        self.decay = decay
        own = {id(p): nn.Parameter(p.detach().clone(), requires_grad=False) for p in model.parameters()}
        statistics = running_statistics(model)
        shared = {id(b): b for b in model.buffers()} | {id(b): b.clone() for b in statistics}
        self.module = copy.deepcopy(model, memo=own | shared).eval()
        self.averages: list[Tensor] = list(self.module.parameters())
        self.parameters: list[Tensor] = list(model.parameters())
        self.statistics = (running_statistics(self.module), statistics)
        # 1 - d of the next update.
        self._share = torch.zeros((), device=self.parameters[0].device)
        self._placed = 0

    def place(self, number: int) -> None:
        """Set the decay of update `number` on the device, without a wait: what an update needs of the host."""
        # The number is an argument and no state, so that checkpoints hold the averaged model alone.
        if number != self._placed:
            # The warm-up of TensorFlow's ExponentialMovingAverage.
            self._share.fill_(1 - min(self.decay, (1 + number) / (10 + number)))
            self._placed = number

    @torch.no_grad()
    def update(self, number: int) -> None:
        """Follow the model after its update `number`, counted from 1 over the whole run."""
        self.place(number)
        for averages, followed in ((self.averages, self.parameters), self.statistics):
            if averages:
                torch._foreach_lerp_(averages, followed, [self._share] * len(averages))

    def state_dict(self) -> dict:
        """The state dict of the averaged model."""
        return self.module.state_dict()

    def load_state_dict(self, state: dict) -> None:
        """Resume an average; keys and shapes must be the model's."""
        self.module.load_state_dict(state, strict=True)
