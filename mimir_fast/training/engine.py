"""Engine: the only place where a training step is assembled.

The order of calls: Loop._train_epoch -> Engine.advance -> the host's part (Task.host_draws, learning rates, seed), then work on
the device alone, which a CUDA graph holds (captured_steps.py): prepare (Task.prepare, Task.draw_noise) -> forward_backward
(autocast, Task.step, Updater.backward); where an update ends Engine.update (Updater.update, average); Meters.add.

It holds the 16-bit copy or the shards, the frozen twin that the attack runs on, compiled functions, data parallelism, the
generator of noise, and the updater.  The loop, bench and the memory prediction each make one; it needs no data set.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from mimir_fast.attacks.pgd_mae import frozen_twin
from mimir_fast.training.captured_steps import CapturedSteps
from mimir_fast.training.compilation import ON_CPU, Compiler, mode_inside
from mimir_fast.training.distributed import GradientBuffer, World, replicated
from mimir_fast.training.meters import Meters
from mimir_fast.training.optimizer import Updater, peak_learning_rate
from mimir_fast.training.parameter_ema import ParameterEMA
from mimir_fast.training.precision import ComputeCopy
from mimir_fast.training.running_statistics import SharedStatistics
from mimir_fast.training.seeds import step_seed
from mimir_fast.training.stages import stage
from mimir_fast.training.step_graph import CudaRecorder, Recorder, outside
from mimir_fast.training.task import Output, Step

if TYPE_CHECKING:
    from mimir_fast.training.sharding import Shards


class Engine:
    """One process's part of a training, without data and logs.

    objective   the module that is trained: the task's, around the 16-bit copy if there is one, replicated or sharded
    attacked    the model that the attack differentiates: the same parameters, none of them trainable, in evaluation mode
    functions   the task's attack functions, as they are or compiled
    updater     backward passes and optimizer updates
    average     running average of the parameters, or None
    rated       the model to validate: the average, else `attacked`
    captured    whether and how micro-steps are launched as CUDA graphs
    meters      what `advance` counts
    updating    True from the beginning of an update to the end of its call: an error leaves parameters and moments of no use
    `task.model` is up to date after every update, unless it is sharded.
    """

    def __init__(
        self,
        task: Step,
        world: World,
        updater: Updater | None = None,
        average: dict | None = None,
        backend: str | Callable = "inductor",
        recorder: Recorder | None = None,
    ):
        """Assemble the step of a task.

        updater    that of a resumed run; None: a new one
        average    state of a resumed running average
        backend    of torch.compile
        recorder   what captures steps; None: CUDA graphs, where the run asks for them
        """
        optim, compute = task.run.config.optim, task.run.compute
        self.task, self.world, self.seed, self.accum_iter = task, world, task.run.config.run.seed, optim.accum_iter
        self.updater = updater or task.updater(peak_learning_rate(optim, world.size))
        self.generator, self.dtype = torch.Generator(world.device), compute.dtype
        self.sharded = world.size > 1 and compute.fsdp
        self.shards: Shards | None = None
        self.buffer: GradientBuffer | None = None
        reason = self._uncapturable()
        recorder = recorder or (None if reason else CudaRecorder(world.device))
        self.captured = CapturedSteps(recorder, world, list(task.model.parameters()), reason)
        self.meters = Meters(task, self.updater, task.run.config.run.log_every)
        self.updating = False
        world.share(task.model.parameters())
        self.statistics = SharedStatistics(task.model, world)
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

    def advance(
        self, images: Tensor, labels: Tensor, epoch: int, step: int, number: int | None = None, first: bool = True
    ) -> Output:
        """One micro-step of a training, the update that it ends, and what the meters count: the only call of the loop.

        epoch, step   its position, which decides its random numbers
        number        of the update that it ends, counted from 1 over the whole run; None: of none
        first         whether it begins an update
        Where steps are captured its output's tensors are overwritten by the next call.
        """
        draws = self._host_draws(images, epoch, step)
        if first:
            self.updater.place()
        if self.average and number is not None:
            self.average.place(number)

        def work(inputs: list[Tensor]) -> Output:
            output = self.forward_backward(*self._prepared(*inputs), number is not None)
            self.meters.add(output, None if number is None else self.update(number))
            return output

        inputs = [images, labels, *([] if draws is None else [draws])]
        seed = partial(self._seed, epoch, step)
        output = self.captured.run(inputs, self.task.form, first, number is not None, seed, work)
        self.updating = False
        return output

    def micro_step(self, images: Tensor, labels: Tensor, epoch: int = 0, step: int = 0, last: bool = True) -> Output:
        """Prepare, attack, forward and backward pass, uncaptured: adds the gradients of one micro-batch.

        images, labels   [B,3,H,W], uint8 or fp32 in [0,1], and int64 [B], on the device
        epoch, step      its position, which decides its random numbers; last: whether an update follows
        """
        return self.forward_backward(*self.prepare(images, labels, epoch, step), last)

    def prepare(self, images: Tensor, labels: Tensor, epoch: int, step: int) -> tuple[Any, Any]:
        """The task's batch, and its random numbers."""
        draws = self._host_draws(images, epoch, step)
        self._seed(epoch, step)
        return self._prepared(images, labels, None if draws is None else draws.to(self.world.device))

    def _host_draws(self, images: Tensor, epoch: int, step: int) -> Tensor | None:
        draws = self.task.host_draws(images, epoch, step)
        return draws if draws is None or self.world.device.type != "cuda" else draws.pin_memory()

    def _seed(self, epoch: int, step: int) -> None:
        self.generator.manual_seed(step_seed(self.seed, self.world.rank, epoch, step))

    def _prepared(self, images: Tensor, labels: Tensor, draws: Tensor | None = None) -> tuple[Any, Any]:
        """Work on the device alone."""
        with stage("prepare"):
            batch = self.task.prepare(images, labels, draws)
            return batch, self.task.draw_noise(self.generator, batch)

    def place(self, shape: tuple[int, ...]) -> Tensor:
        """Where images of this shape are best written for the next micro-step, in the dtype that the task takes as it is."""
        return self.captured.place(shape, self.task.pixels)

    def forward_backward(self, batch: Any, noise: Any, last: bool = True) -> Output:
        """Attack, forward and backward pass: the rest of a micro-step, which is work on the device alone."""
        with self._gradients_held() if not last else nullcontext():
            with torch.autocast(self.world.device.type, dtype=self.dtype, enabled=self.dtype != torch.float32):
                output = self.task.step(self.objective, self.attacked, self.functions, batch, noise)
            self.updater.backward(output.loss, self.accum_iter, output.checked)
        return output

    def update(self, number: int = 1) -> Tensor:
        """Step the optimizer and the running average; returns the gradients' global L2 norm, a scalar on the device.

        number   of the update, counted from 1 over the whole run
        """
        self.updating = True
        if self.buffer:
            self.buffer.gather()
            outside(self.buffer.average, in_place=True)
        if not self.statistics.empty:
            outside(self.statistics.average, in_place=True)
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

    # ---- assembly

    def _uncapturable(self) -> str:
        """Why steps are not captured; "" if they are."""
        if self.world.device.type != "cuda":
            return ON_CPU
        if not self.task.run.compute.step_graph:
            return "--step_graph off"
        return "--parallel fsdp gathers parameters block by block" if self.sharded else self.task.uncapturable

    def _start_average(self, saved: dict | None) -> ParameterEMA | None:
        if self.task.average_decay is None:
            return None
        average = ParameterEMA(self.task.model, self.task.average_decay)
        if saved:
            average.load_state_dict(saved)
        return average

    def _compute_model(self) -> nn.Module:
        """The model that computes: the task's, or its 16-bit copy, which the updater then takes care of."""
        model = self.task.model
        if self.dtype == torch.float32:
            return model
        # tf32 for what stays in fp32: the patch embedding.
        if self.world.device.type == "cuda":
            torch.set_float32_matmul_precision("high")
        if self.sharded:
            return model
        self.updater.compute = ComputeCopy(model, self.dtype)
        return self.updater.compute.module

    def _compiler(self, backend: str | Callable) -> Compiler:
        compute = self.task.run.compute
        mode = mode_inside(compute.compile_mode, self.captured.reason, self.accum_iter)
        how = (compute.compile, mode, compute.compile_region, backend, compute.kernels == "reference")
        return Compiler(*how, through=self._gathered if self.sharded else None)

    def _gathered(self, function: Callable) -> Callable:
        """A function with `function`'s arguments that gathers the parameters of its model."""

        def gathered(model: nn.Module, *inputs: Tensor):
            # The shards are made after the functions, before the first of them is called.
            assert self.shards is not None
            return self.shards.run(function, model, *inputs)

        return gathered

    def _parallel(self, objective: nn.Module) -> nn.Module:
        """The objective, sharded or replicated where there are several processes: by DDP, or with one buffer of gradients."""
        if self.world.size == 1:
            return objective
        compress = self.task.run.compute.compress_gradients
        if not self.captured.reason:
            self.buffer = GradientBuffer(self.task.model.parameters(), self.world, compress)
            return objective
        if self.sharded:
            # Slow to import: only where there are shards.
            from mimir_fast.training.sharding import Shards

            dtypes = (self.dtype, torch.bfloat16 if compress else torch.float32)
            self.shards = Shards(objective, self.attacked, self.average, self.updater, self.world, *dtypes)
            return objective
        # A static graph forbids holding gradients back.
        return replicated(objective, self.world, compress, self.accum_iter == 1 or self.updater.compute is not None)

    def _gradients_held(self) -> AbstractContextManager:
        """Context in which gradients are not averaged over processes."""
        # 16-bit gradients are averaged in every micro-step, before they are added up in fp32.
        if isinstance(self.objective, DistributedDataParallel) and self.updater.compute is None:
            return self.objective.no_sync()
        return nullcontext()
