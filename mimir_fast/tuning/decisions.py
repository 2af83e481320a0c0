"""Deciding: what a run computes with, from its flag, its checkpoint, what was measured before, or by measuring now."""

import argparse
import contextlib
import platform
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mimir_fast import __version__
from mimir_fast.config.resolve import DTYPES, Run
from mimir_fast.training.compilation import WITHOUT_GRAPHS, Compiler
from mimir_fast.training.distributed import World
from mimir_fast.training.task import Step
from mimir_fast.tuning.candidates import Workbench, candidates_of, place_tiles
from mimir_fast.tuning.measuring import TOO_LATE, Bench, Trial, fastest, measure
from mimir_fast.tuning.records import AGAIN, AUTO, OFF, WORDS, Candidate, Choices, Problem, as_text, from_text
from mimir_fast.tuning.remembered import Environment, Measured, file_of, key, recall, remember
from mimir_fast.tuning.timers import Stopwatch, stopwatch_for

# Seconds after which a run tries no further candidate.
LIMIT = 60.0
DRIVER, CPUS = Path("/proc/driver/nvidia/version"), Path("/proc/cpuinfo")
Say = Callable[[str], None]


def decide(task: Step, world: World, state: Mapping, say: Say) -> None:
    """Decide, let the model and the launchers know, and write the choices into the task's run; all processes call.

    state   the checkpoint that is resumed; empty: none is
    Raises NothingWorksError where no implementation works, ValueError for choices of --tune that do not exist here.
    """
    run, asked = task.run, task.run.compute.tune
    if asked == AUTO and (before := recorded(state)):
        say(f"tune: as the resumed run began: {before}; --tune {AGAIN} measures anew")
        asked = before
    if asked in (AUTO, AGAIN):
        # One measures, so that all compute with the same kernels whatever each of them would find.
        asked = world.agreed(as_text(choose(run, world.device, say, again=asked == AGAIN)) if world.is_main else "")
    choices = possible(from_text(asked) if asked and asked not in WORDS else {}, run, world.device, say)
    place(task.model, choices, run)
    place_tiles(choices, world.device)
    task.run = run.tuned(as_text(choices) or OFF)


def recorded(state: Mapping) -> str:
    """What a resumed checkpoint was computed with, as a value of --tune; "" where there is none to go on with."""
    if "mimir_fast" not in state:
        return ""
    args = state.get("args", {})
    return str((vars(args) if isinstance(args, argparse.Namespace) else args).get("tune", OFF))


def choose(run: Run, device: torch.device, say: Say, again: bool = False) -> Choices:
    """The fastest candidate of every problem of a run that has a choice."""
    trials = trials_of(run, device, say, again)
    return {problem.place: fastest(found) for problem, found in trials.items()}


def trials_of(
    run: Run, device: torch.device, say: Say, again: bool = False, limit: float = LIMIT, whole: bool = False
) -> dict[Problem, list[Trial]]:
    """Trials of every problem of a run that has a choice: remembered, or measured now and remembered.

    again   measure all anew; limit: seconds after which no further candidate is tried
    whole   also measure those anew of which candidates were not tried
    """
    # It builds a task and an engine, as the training loop does, which imports this module.
    from mimir_fast.tuning.problems import problems_of

    problems = {problem: candidates_of(problem, device) for problem in problems_of(run)}
    problems = {problem: candidates for problem, candidates in problems.items() if len(candidates) > 1}
    environment = environment_of(device, run)
    known: Measured = {} if again else recall(environment, say)

    def stale_one(problem: Problem) -> bool:
        # A list of candidates that has changed since, by a package that was installed, is measured anew.
        trials = known.get(key(problem), [])
        late = whole and any(trial.why == TOO_LATE for trial in trials)
        return late or [trial.candidate for trial in trials] != problems[problem]

    stale = [problem for problem in problems if stale_one(problem)]
    if stale:
        where = f"{environment['device']}, at most {limit:.0f} s; remembered in {file_of(environment)}"
        say(f"tune: measuring {len(stale)} operations on {where}; --tune {OFF} takes the defaults")
        kept = True
        for problem, trials in measure_all({p: problems[p] for p in stale}, device, run, say, limit):
            known[key(problem)] = trials
            # One by one: whoever is stopped meanwhile goes on from there.
            kept = kept and remember(environment, {key(problem): trials}, say)
    return {problem: known[key(problem)] for problem in problems}


def measure_all(
    problems: dict[Problem, list[Candidate]], device: torch.device, run: Run, say: Say, limit: float
) -> Iterator[tuple[Problem, list[Trial]]]:
    """Trials of these candidates, each problem with its part of the time."""
    stopwatch, compiled = stopwatch_for(device), compiler_of(run)
    ends = time.monotonic() + limit
    for number, (problem, candidates) in enumerate(problems.items()):
        left = ends - time.monotonic()
        # What one leaves over goes to those after it.
        own = time.monotonic() + left / (len(problems) - number)
        say(f"tune: [{number + 1}/{len(problems)}] {problem}: {len(candidates)} candidates, {max(left, 0):.0f} s left")

        def bench(batch_problem: Problem) -> Bench:
            return Workbench(batch_problem, device, stopwatch, compiled)

        yield problem, measure_one(problem, candidates, bench, stopwatch, say, own)
    place_tiles({}, device)
    if device.type == "cuda":
        # The run reports the peak of its own.
        torch.cuda.reset_peak_memory_stats(device)


def measure_one(
    problem: Problem,
    candidates: list[Candidate],
    bench: Callable[[Problem], Bench],
    watch: Stopwatch,
    say: Say,
    ends: float,
) -> list[Trial]:
    """Trials of one problem; with fewer images where the reference in float64 does not fit into memory."""
    batch, ready = problem.batch, None
    while True:
        try:
            with watch.context(), torch._dynamo.config.patch(recompile_limit=64):
                ready = bench(replace(problem, batch=batch))
                return measure(problem, candidates, ready, say, ends)
        except torch.OutOfMemoryError:
            if batch == 1:
                raise
            batch //= 2
        finally:
            # Its tensors, before memory is given back.
            ready = None
            watch.release()


def compiler_of(run: Run) -> Callable[[Callable], Callable]:
    """What makes a function what the run would make of it."""
    compute = run.compute
    mode = WITHOUT_GRAPHS.get(compute.compile_mode, compute.compile_mode)
    return Compiler(compute.compile, mode, reference=compute.kernels == "reference").trained


def environment_of(device: torch.device, run: Run) -> Environment:
    """All that a time depends on beside its problem."""
    cuda = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if cuda else f"{processor()}, {torch.get_num_threads()} threads",
        "driver": driver_version() if cuda else "",
        "torch": torch.__version__,
        "triton": triton_version() if cuda else "",
        "mimir_fast": __version__,
        "compile": f"{run.compute.compile_mode}" if run.compute.compile else "off",
    }


def processor() -> str:
    """The CPU's name, or its kind where the system does not tell the name."""
    with contextlib.suppress(OSError):
        if found := re.search(r"model name\s*:\s*(.+)", CPUS.read_text(encoding="utf-8", errors="replace")):
            return found[1]
    return platform.machine()


def driver_version() -> str:
    """The driver's own version; "unknown" where the system does not tell it, as in some containers."""
    with contextlib.suppress(OSError):
        if found := re.search(r"\d+\.[\d.]+", DRIVER.read_text(encoding="utf-8", errors="replace")):
            return found[0]
    # torch 2.14 has no function for it any more.
    return "unknown"


def triton_version() -> str:
    # CPU-only installations have no Triton.
    import triton

    return triton.__version__


def possible(choices: Choices, run: Run, device: torch.device, say: Say) -> Choices:
    """Those choices that can be computed with here, of operations that the flags leave open; lines about the others."""
    found: Choices = {}
    for problem, candidate in choices.items():
        if problem.op not in run.compute.measured or DTYPES[problem.dtype] != run.compute.dtype:
            continue
        if candidate in candidates_of(problem, device):
            found[problem] = candidate
        else:
            say(f"tune: {problem}: {candidate} does not exist here; it computes with the default")
    return found


def sizes_of(module: Any, op: str) -> tuple[int, ...] | None:
    """The sizes of a module's attention without its tokens (heads, numbers per head), or of its MLP; None if it has none."""
    if op == "attention" and hasattr(module, "backend"):
        return module.num_heads, module.proj.in_features // module.num_heads
    if op == "mlp" and hasattr(module, "mlp_kernels"):
        return module.mlp.fc1.in_features, module.mlp.fc1.out_features
    return None


def place(model: nn.Module, choices: Choices, run: Run) -> None:
    """Let a model's modules compute with these choices, and with the run's defaults where there are none."""
    modules: Iterable[Any] = model.modules()
    for module in modules:
        if sizes := sizes_of(module, "attention"):
            own = {p.sizes[0]: c.name for p, c in choices.items() if p.op == "attention" and p.sizes[1:] == sizes}
            if own:
                module.backend = {**own, 0: run.compute.attention}
        if sizes := sizes_of(module, "mlp"):
            for problem, candidate in choices.items():
                if problem.op == "mlp" and problem.sizes == sizes:
                    module.mlp_kernels = candidate.name
