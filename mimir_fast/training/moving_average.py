"""A running average of the parameters, kept on the device."""

import copy
from collections.abc import Callable

import torch
from torch import nn


class RunningAverage:
    """average <- d * average + (1 - d) * parameters, after every optimizer update.

    module       a frozen copy of the model that holds the average, for validation and checkpoints
    decay        d, but at most (1 + n) / (10 + n) at update n, so that short runs forget where they began; 0 <= decay < 1,
                 raises ValueError otherwise
    Make it after the processes agreed on the parameters.  Its state is the module's state dict: the number of the update is
    an argument, so a run that is taken up again goes on exactly.
    """

    def __init__(self, model: nn.Module, decay: float):
        if not 0 <= decay < 1:
            raise ValueError(f"model_ema_decay: expected 0 <= decay < 1, got {decay}")
        self.decay = decay
        self.module = copy.deepcopy(model).eval().requires_grad_(False)
        self.averages, self.parameters = list(self.module.parameters()), list(model.parameters())

    @torch.no_grad()
    def update(self, number: int) -> None:
        """Follow the model after its update `number`, counted from 1 over the whole run."""
        decay = min(self.decay, (1 + number) / (10 + number))
        torch._foreach_lerp_(self.averages, self.parameters, 1 - decay)

    def state_dict(self) -> dict:
        """The averaged model's."""
        return self.module.state_dict()

    def load_state_dict(self, state: dict) -> None:
        """Take up an average; keys and shapes must be the model's."""
        self.module.load_state_dict(state, strict=True)


def take_up_average(average: RunningAverage | None, saved: dict | None, say: Callable[[str], None]) -> None:
    """Load a resumed run's average; a line where this run keeps one and that did not, or the reverse."""
    if average and saved:
        average.load_state_dict(saved)
    elif average:
        say("model_ema: the resumed run kept no average; it starts from the parameters of now")
    elif saved:
        say("model_ema: the resumed run kept an average; without the flag it ends here")
