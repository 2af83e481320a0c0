"""What a step runs and touches, and the only place where it is put together.

A 16-bit copy or shards, the frozen twin under attack, compiled functions, data parallelism, the generator of noise, autocast,
and the updates.  Whoever wants a step (the loop, bench, the memory prediction) makes an Engine; no data set is needed.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from mimir_fast.attacks.pgd_mae import frozen_twin
from mimir_fast.training.compilation import Compiler
from mimir_fast.training.distributed import World, average_gradients
from mimir_fast.training.moving_average import RunningAverage
from mimir_fast.training.optimizer import Updater, peak_learning_rate
from mimir_fast.training.precision import ComputeCopy
from mimir_fast.training.seeds import step_seed
from mimir_fast.training.stages import stage
from mimir_fast.training.task import Output, Step


class Engine:
    """One process's part of a training, without data and logs.

    objective   what is trained: the task's, around the 16-bit copy where there is one, replicated or sharded
    attacked    what the attack differentiates: the same parameters with nothing to train, in evaluation mode
    functions   the task's attack functions, plain or compiled
    updater     backward passes and optimizer updates; average: the running average of the parameters, or None
    rated       what validation judges: the average, else `attacked`
    `task.model` is up to date after every update, unless it is sharded.
    """

    def __init__(
        self,
        task: Step,
        world: World,
        updater: Updater | None = None,
        average: dict | None = None,
        backend: str | Callable = "inductor",
    ):
        """updater: of a resumed run, `task.updater` without; average: a resumed running average; backend: torch.compile's."""
        optim, compute = task.run.config.optim, task.run.compute
        self.task, self.world, self.seed, self.accum_iter = task, world, task.run.config.run.seed, optim.accum_iter
        self.updater = updater or task.updater(peak_learning_rate(optim, world.size))
        self.generator, self.dtype = torch.Generator(world.device), compute.dtype
        self.sharded = world.size > 1 and compute.fsdp
        self.shards = None
        world.share(task.model.parameters())
        self.average = self._start_average(average)
        model = self._compute_model()
        self.attacked = frozen_twin(model).eval()
        self.rated = self.average.module if self.average else self.attacked
        compiler = self._compiler(backend)
        for compiled in dict.fromkeys((model, self.attacked, self.rated)):
            compiler.blocks(compiled)
        self.functions = task.attack_functions(compiler)
        self.objective = self._parallel(task.objective(model, compiler))

    # ---- the step

    def micro_step(self, images_u8: Tensor, labels: Tensor, epoch: int = 0, step: int = 0, last: bool = True) -> Output:
        """Prepare, attack, forward, backward: adds the gradients of one micro-batch.

        images_u8 [B,3,H,W] and labels int64 [B] on the device; epoch, step: its position, which decides its random numbers;
        last: whether an update follows.  The host is asked in `prepare` alone.
        """
        return self.compute(*self.prepare(images_u8, labels, epoch, step), last)

    def prepare(self, images_u8: Tensor, labels: Tensor, epoch: int, step: int) -> tuple[Any, Any]:
        """The task's batch, and its noise."""
        with stage("prepare"):
            batch = self.task.prepare(images_u8, labels, epoch, step)
            self.generator.manual_seed(step_seed(self.seed, self.world.rank, epoch, step))
            return batch, self.task.draw_noise(self.generator, batch)

    def compute(self, batch: Any, noise: Any, last: bool = True) -> Output:
        """Everything after that: work on the device, without a decision by the host."""
        device = self.world.device.type
        with self._gradients_held() if not last else nullcontext():
            with torch.autocast(device, dtype=self.dtype, enabled=self.dtype != torch.float32):
                output = self.task.step(self.objective, self.attacked, self.functions, batch, noise)
            self.updater.backward(output.loss, self.accum_iter)
        return output

    def update(self, number: int = 1) -> Tensor:
        """Step the optimizer and what follows the parameters; returns the gradients' global L2 norm, a device scalar.

        number: of the update, counted from 1 over the whole run.
        """
        norm = self.updater.update()
        if self.average:
            self.average.update(number)
        return norm

    def states(self) -> dict:
        """A checkpoint's entries `model`, `optimizer` and, with an average, `model_ema`, whole; every process calls it."""
        if self.shards:
            return self.shards.states(self.average)
        states = {"model": self.task.model.state_dict(), "optimizer": self.updater.optimizer.state_dict()}
        return states | ({"model_ema": self.average.state_dict()} if self.average else {})

    # ---- putting it together

    def _start_average(self, saved: dict | None) -> RunningAverage | None:
        if self.task.average_decay is None:
            return None
        average = RunningAverage(self.task.model, self.task.average_decay)
        if saved:
            average.load_state_dict(saved)
        return average

    def _compute_model(self) -> nn.Module:
        """The model that computes: the task's, or its 16-bit copy, which the updater then takes care of."""
        model = self.task.model
        if self.dtype == torch.float32:
            return model
        if self.world.device.type == "cuda":
            torch.set_float32_matmul_precision("high")  # tf32 for what stays in fp32: the patch embedding
        if self.sharded:
            return model
        self.updater.compute = ComputeCopy(model, self.dtype)
        return self.updater.compute.module

    def _compiler(self, backend: str | Callable) -> Compiler:
        compute = self.task.run.compute
        how = (compute.compile, compute.compile_mode, compute.compile_region, backend, compute.kernels == "reference")
        return Compiler(*how, through=self._gathered if self.sharded else None)

    def _gathered(self, function: Callable) -> Callable:
        return lambda model, *inputs: self.shards.run(function, model, *inputs)

    def _parallel(self, objective: nn.Module) -> nn.Module:
        """The objective among processes."""
        if self.world.size == 1:
            return objective
        compress = self.task.run.compute.compress_gradients
        if self.sharded:
            from mimir_fast.training.sharding import Shards  # slow to import: only where there are shards

            dtypes = (self.dtype, torch.bfloat16 if compress else torch.float32)
            self.shards = Shards(objective, self.attacked, self.average, self.updater, self.world, *dtypes)
            return objective
        devices = [self.world.device] if self.world.device.type == "cuda" else None
        # a static graph forbids holding gradients back
        static = self.accum_iter == 1 or self.updater.compute is not None
        options = {"gradient_as_bucket_view": True, "static_graph": static}
        replicated = DistributedDataParallel(objective, device_ids=devices, **options)
        replicated.register_comm_hook(compress, average_gradients)
        return replicated

    def _gradients_held(self) -> AbstractContextManager:
        """Inside, gradients are not averaged over processes.

        16-bit gradients are averaged before they are added up in fp32, so they are never held back.
        """
        return self.objective.no_sync() if self.world.size > 1 and not self.updater.compute else nullcontext()
