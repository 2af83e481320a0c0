"""Masks that the host draws for families whose encoder needs more of a mask than which patches it keeps (masks_on_host)."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from mimir_fast.models import MaskedAutoencoder

# Draws of one mask; a family refuses fewer than one in 10^3.
TRIES = 1000


class HostMasks:
    """The masks of a step as one row of int32 numbers: one copy to the device, into one static buffer of a captured step.

    ratios   the share that each mask removes: those of the attack's steps, then the training's
    """

    def __init__(self, model: MaskedAutoencoder, ratios: Sequence[float]):
        self.model, self.ratios = model, ratios
        self._shape = model.noise_shape(1)
        # Numbers of every plan, the same for all steps.
        self._lengths: list[int] = []

    def draw(self, seed: int) -> Tensor:
        """The row of a step, in host memory: the bits of all masks' noise, then their plans."""
        # numpy's, and not torch's: what is drawn must be there also where tensors are fake.
        generator = np.random.Generator(np.random.Philox(seed))
        masks, plans = zip(*(self._mask(generator, ratio) for ratio in self.ratios))
        self._lengths = [len(plan) for plan in plans]
        return torch.from_numpy(np.concatenate([*(mask.view(np.int32).ravel() for mask in masks), *plans]))

    def unpack(self, row: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Noise [rows,L] and plan [n] of every mask, from the row on the device; views of it."""
        count, rows, patches = len(self.ratios), *self._shape
        first = count * rows * patches
        noise = row[:first].view(torch.float32).view(count, rows, patches)
        return list(noise), list(row[first:].split(self._lengths))

    def _mask(self, generator: np.random.Generator, ratio: float) -> tuple[np.ndarray, np.ndarray]:
        for _ in range(TRIES):
            noise = generator.random(self._shape, np.float32)
            plan = self.model.host_plan(noise, ratio)
            if plan is not None:
                return noise, plan
        raise RuntimeError(f"mask_ratio: of {TRIES} masks at {ratio} none could be laid out")
