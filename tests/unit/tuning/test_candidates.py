"""Candidates by device, and a problem that is really computed and timed, on the CPU."""

import pytest
import torch

from mimir_fast.tuning import candidates
from mimir_fast.tuning.candidates import Workbench, candidates_of
from mimir_fast.tuning.measuring import fastest, measure
from mimir_fast.tuning.records import Candidate, Problem
from mimir_fast.tuning.timers import CpuStopwatch

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
SMALL = Problem("attention", (9, 2, 8), "fp32", 3)


@pytest.fixture
def hopper(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(candidates, "find_spec", lambda name: name == "xformers")


def names(problem: Problem, device: torch.device) -> list[str]:
    return [str(candidate) for candidate in candidates_of(problem, device)]


def test_candidates_on_a_gpu(hopper):
    """Must fail for: a package that is not installed; our kernel at a size that it does not take."""
    torch_own = ["sdpa_cudnn", "sdpa_flash", "sdpa_efficient", "xformers", "sdpa"]
    found = names(Problem("attention", (50, 12, 64), "bf16", 512), CUDA)
    assert found[0] == "short"
    assert found[-5:] == torch_own
    assert all(name.startswith("short/") for name in found[1:-5])
    assert names(Problem("attention", (257, 12, 64), "bf16", 256), CUDA) == torch_own
    found = names(Problem("mlp", (768, 3072), "bf16", 64), CUDA)
    assert (found[0], found[-1]) == ("triton", "reference")
    assert names(Problem("mlp", (96, 384), "bf16", 64), CUDA) == ["reference"]


def test_candidates_on_a_cpu():
    assert names(Problem("attention", (17, 3, 64), "fp32", 2), CPU) == ["math", "sdpa"]
    assert names(Problem("attention", (197, 16, 8), "fp32", 2), CPU) == ["narrow", "sdpa"]


def workbench() -> Workbench:
    return Workbench(SMALL, CPU, CpuStopwatch(), lambda function: function)


def test_a_problem_is_computed_and_timed():
    before = torch.get_rng_state()
    found = [Candidate("math"), Candidate("sdpa")]
    trials = measure(SMALL, found, workbench(), print, rounds=2)
    assert all(trial.seconds > 0 for trial in trials)
    assert fastest(trials) in found
    assert torch.equal(torch.get_rng_state(), before), "a run draws the same numbers, measured or not"


@pytest.mark.parametrize("where", ["output", "gradient 0"])
def test_wrong_values_are_found(monkeypatch, where):
    """In the output, and in its gradient alone."""
    right = candidates.attention

    def wrong(qkv, *rest):
        out = right(qkv, *rest)
        bad = out * 1.001
        return bad if where == "output" else out.detach() + bad - bad.detach()

    bench = workbench()
    assert bench.wrong(Candidate("sdpa")) == ""
    monkeypatch.setattr(candidates, "attention", wrong)
    assert workbench().wrong(Candidate("sdpa")).startswith(f"{where}: off by")
