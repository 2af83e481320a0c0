"""Fully sharded data parallelism (FSDP2): every process keeps its share of parameters, gradients and optimizer moments.

For models whose 16 bytes per parameter (fp32 parameter, gradient, two moments) do not fit on each GPU.  Parameters are
gathered block by block for the forward pass and kept until the block's backward pass is done.
"""

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from mimir_fast.training.compilation import blocks_of
from mimir_fast.training.distributed import World
from mimir_fast.training.optimizer import Updater
from mimir_fast.training.parameter_ema import ParameterEMA


class Gathered(nn.Module):
    """A model whose parameters are gathered while a function of it runs: FSDP gathers them when a module is called."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, function: Callable, *inputs: Tensor):
        return function(self.model, *inputs)


class Shards:
    """This process's share of a model in training, of its optimizer, and of the twin and the average that follow it.

    Used in place of ComputeCopy (`take_gradients` after every backward pass, `refresh` after every update).  The optimizer
    works on plain local tensors.  The frozen twin's blocks are kept in the compute precision, a running average in fp32.
    """

    def __init__(
        self,
        objective: nn.Module,
        twin: nn.Module,
        average: ParameterEMA | None,
        updater: Updater,
        world: World,
        dtype: torch.dtype,
        reduce_dtype: torch.dtype = torch.float32,
    ):
        """Shard the objective's model, whose parameters the updater's optimizer has; dtype: in which blocks compute."""
        self.model, self.optimizer = objective.get_submodule("model"), updater.optimizer
        whole = list(self.model.parameters())
        mesh = init_device_mesh(world.device.type, (world.size,))
        # Parameters alone: buffers are the model's own, whose running statistics the twin follows.
        for p in (p for block in blocks_of(twin) for p in block.parameters()):
            p.data = p.data.to(dtype)
        # Inputs stay as they are: FSDP would round the stream of tokens to 16 bits at every block.
        policy = MixedPrecisionPolicy(dtype, reduce_dtype, cast_forward_inputs=False)
        self.followers = {model: Gathered(model) for model in (twin, *([average.module] if average else []))}
        for root, model in ((objective, self.model), *((root, model) for model, root in self.followers.items())):
            shard(root, model, mesh, policy)
        # Gathered once for all steps of an attack, and freed before the training pass.
        for module in self._following():
            module.set_reshard_after_backward(False, recurse=False)
        objective.register_forward_pre_hook(lambda *_: self.let_go())
        self.sharded = _sharded(self.model)
        # Plain tensors over the same memory, for the optimizer.
        self.local = [
            nn.Parameter(_distributed(p.detach()).to_local(), requires_grad=p.requires_grad) for p in self.sharded
        ]
        self.twins = [p.to_local() for p in _sharded(twin)]
        if average:
            average.averages = [p.to_local() for p in _sharded(average.module)]
            average.parameters = list(self.local)
        self._share_optimizer(dict(zip(whole, zip(self.local, self.sharded))))
        updater.compute, updater.total_norm = self, self.total_norm

    def _share_optimizer(self, of: dict[nn.Parameter, tuple[nn.Parameter, DTensor]]) -> None:
        state = self.optimizer.state
        for group in self.optimizer.param_groups:
            for p in group["params"]:
                local, sharded = of[p]
                for name, value in state.pop(p, {}).items():
                    if value.shape == p.shape:
                        value = distribute_tensor(value, sharded.device_mesh, sharded.placements).to_local()
                    state[local][name] = value
            group["params"] = [of[p][0] for p in group["params"]]

    def run(self, function: Callable, model: nn.Module, *inputs: Tensor):
        """function(model, *inputs) with the parameters of the model, the twin or the average, gathered."""
        return self.followers[model](function, *inputs)

    def take_gradients(self) -> None:
        """Give the optimizer's parameters the gradients of the last backward pass."""
        for p, local in zip(self.sharded, self.local):
            local.grad = None if p.grad is None else _distributed(p.grad).to_local()

    @torch.no_grad()
    def refresh(self) -> None:
        """After an update: clear the gradients and let the twin follow."""
        for p in self.sharded:
            p.grad = None
        torch._foreach_copy_(self.twins, [p.detach() for p in self.local])
        self.let_go()

    def let_go(self) -> None:
        """Free gathered parameters of the followers, which are older than the shares after an update."""
        for module in self._following():
            module.reshard()

    def _following(self) -> list[FSDPModule]:
        modules = (module for root in self.followers.values() for module in root.modules())
        return [module for module in modules if isinstance(module, FSDPModule)]

    def total_norm(self, gradients: list[Tensor]) -> Tensor:
        """L2 norm of all gradients on all processes; not finite on all of them if one is not."""
        square = torch.nn.utils.get_total_norm(gradients).square()
        # Squares add up over shares: no number of a gradient is on two processes.
        dist.all_reduce(square)
        return square.sqrt()

    def states(self, average: ParameterEMA | None) -> dict:
        """State dicts of the whole model, optimizer and average, gathered; every process calls."""
        moments = self.optimizer.state_dict()
        sharded = dict(zip(self.local, self.sharded))
        order = [sharded[p] for group in self.optimizer.param_groups for p in group["params"]]
        # The optimizer's state dict counts parameters from 0 in the order of its groups.
        for i, state in moments["state"].items():
            moments["state"][i] = {name: _whole(value, order[i]) for name, value in state.items()}
        states = {"model": gathered_state(self.model), "optimizer": moments}
        return states | ({"model_ema": gathered_state(average.module)} if average else {})


def shard(root: nn.Module, model: nn.Module, mesh: DeviceMesh, policy: MixedPrecisionPolicy) -> None:
    """Shard a model's blocks one by one and the rest as one group, gathered when root is called and kept in fp32."""
    for block in blocks_of(model):
        fully_shard(block, mesh=mesh, mp_policy=policy, reshard_after_forward=False)
    fully_shard(root, mesh=mesh, mp_policy=MixedPrecisionPolicy(cast_forward_inputs=False), reshard_after_forward=False)


def gathered_state(model: nn.Module) -> dict[str, Tensor]:
    """The state dict of a sharded model, whole on every process; buffers are not sharded."""
    return {name: t.full_tensor() if isinstance(t, DTensor) else t for name, t in model.state_dict().items()}


def _whole(value: Tensor, like: DTensor) -> Tensor:
    """A tensor of the optimizer's state, gathered if it has the shape of this process's share of the parameter."""
    # The count of updates is a scalar, the same on every process.
    if value.shape != like.to_local().shape:
        return value
    mesh, placements = like.device_mesh, like.placements
    whole = DTensor.from_local(value, mesh, placements, run_check=False, shape=like.shape, stride=like.stride())
    return whole.full_tensor()


def _sharded(model: nn.Module) -> list[DTensor]:
    """The parameters of a model after `shard`."""
    return [_distributed(p) for p in model.parameters()]


def _distributed(tensor: Tensor) -> DTensor:
    """A tensor of a sharded model under its own type, which torch's annotations do not tell."""
    assert isinstance(tensor, DTensor)
    return tensor
