"""Running statistics of batch normalisation, which forward passes of a training move: buffers, which no optimizer has."""

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from mimir_fast.training.distributed import World


def running_statistics(model: nn.Module) -> list[Tensor]:
    """Means and variances in a model's order; not the counts of batches, which are integers."""
    norms = (module for module in model.modules() if isinstance(module, _BatchNorm))
    return [b for norm in norms for b in (norm.running_mean, norm.running_var) if b is not None]


class SharedStatistics:
    """The same running statistics in all processes: their mean, at every update.

    Each process normalises with statistics of its own batch, as in the original, which goes on with those of process 0.  They
    become views of one buffer, which collectives take as it is.
    """

    def __init__(self, model: nn.Module, world: World):
        tensors = running_statistics(model)
        self.world, self.empty = world, not tensors or world.size == 1
        if self.empty:
            return
        world.share(tensors)
        self.flat = torch.cat([t.flatten() for t in tensors])
        for tensor, part in zip(tensors, self.flat.split([t.numel() for t in tensors])):
            # By .data a buffer stays the object that its module holds, and that twins of the model share.
            tensor.data = part.view_as(tensor)

    def average(self) -> None:
        """Average over all processes, which all call."""
        self.flat /= self.world.size
        dist.all_reduce(self.flat)
