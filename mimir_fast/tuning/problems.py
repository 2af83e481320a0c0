"""The problems of a run: every attention and MLP that its step computes, found by following one on fake tensors."""

from dataclasses import replace

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.modules.module import register_module_forward_pre_hook

from mimir_fast.config.resolve import WORDS, Run
from mimir_fast.memory.prediction import fake_task, shorten
from mimir_fast.training.engine import Engine
from mimir_fast.tuning.decisions import sizes_of
from mimir_fast.tuning.records import Problem


def problems_of(run: Run) -> list[Problem]:
    """Every problem of the run's step, the largest of those that share a choice, in the order of the step."""
    found: dict[Problem, Problem] = {}
    dtype = WORDS[run.compute.dtype]

    def seen(module: nn.Module, inputs: tuple) -> None:
        for op in run.compute.measured:
            if (sizes := sizes_of(module, op)) is None:
                continue
            B, T, _ = inputs[0].shape
            one = Problem(op, (T, *sizes), dtype, B) if op == "attention" else Problem(op, sizes, dtype, B * T)
            known = found.setdefault(one.place, one)
            if known.batch < one.batch:
                found[one.place] = one

    # Hooks see eager modules only; one block shows the sizes of all.
    eager = replace(run, compute=replace(run.compute, compile=False, activation_checkpointing=False))
    hook = register_module_forward_pre_hook(seen)
    try:
        with FakeTensorMode():
            task = fake_task(eager)
            shorten(task.model, 1)
            engine, side = Engine(task, task.world), run.config.model.input_size
            images = torch.empty(run.config.optim.batch_size, 3, side, side, dtype=torch.uint8)
            engine.micro_step(images, torch.empty(len(images), dtype=torch.int64))
    finally:
        hook.remove()
    return list(found.values())
