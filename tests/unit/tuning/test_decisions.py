"""What a run computes with: measured, remembered, resumed, said by name, on one process and on several."""

import argparse

import pytest
import torch

from mimir_fast.config.pretraining import PretrainConfig
from mimir_fast.config.resolve import Machine, resolve
from mimir_fast.training.distributed import World
from mimir_fast.training.train import build_task
from mimir_fast.tuning import decisions
from mimir_fast.tuning.decisions import decide
from mimir_fast.tuning.records import Candidate, Problem
from mimir_fast.tuning.remembered import file_of
from tests.support.pretend import OUT_OF_MEMORY, Pretend

# Heads of 64 and of 8 numbers: the encoder's 5 tokens and the decoder's 17.
FLAGS = {
    "model": "mae_vit_ti", "input_size": 16, "patch_size": 4, "device": "cpu", "compile": True, "dataset": "imagefolder",
    "attack": "pgd_mae", "batch_size": 4, "recipe": None,
}  # fmt: skip
ENCODER, DECODER = "attention 5x3x64 fp32", "attention 17x16x8 fp32"
FAST_NARROW = {ENCODER: {"math": 1.0, "sdpa": 2.0}, DECODER: {"narrow": 1.0, "math": 3.0, "sdpa": 2.0}}
FAST_SDPA = {ENCODER: {"math": 2.0, "sdpa": 1.0}, DECODER: {"narrow": 2.0, "math": 3.0, "sdpa": 1.0}}


@pytest.fixture(autouse=True)
def _home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))


def task_of(**flags):
    config = PretrainConfig().updated({k: v for k, v in (FLAGS | flags).items() if v is not None})
    return build_task(resolve(config.check(), set(flags), Machine(0, lambda: None)), World())


@pytest.fixture
def pretended(monkeypatch):
    """table -> the problems that were measured since, in a list that grows."""

    def pretend(table: dict) -> list[Problem]:
        measured: list[Problem] = []

        def bench(problem: Problem, *_) -> Pretend:
            measured.append(problem)
            return Pretend(table[str(problem)])

        monkeypatch.setattr(decisions, "Workbench", bench)
        return measured

    return pretend


def decided(task, world: World | None = None, state: dict | None = None) -> list[str]:
    said: list[str] = []
    decide(task, world or World(), state or {}, said.append)
    return said


def resumed(tune: str | None) -> dict:
    return {"mimir_fast": {}, "args": argparse.Namespace(**({} if tune is None else {"tune": tune}))}


def backends(task) -> tuple:
    return task.model.blocks[0].attn.backend, task.model.decoder_blocks[0].attn.backend


def test_the_fastest_is_measured_once_recorded_and_remembered(pretended):
    """Must fail for: nothing remembered; a choice that does not reach the modules; the default written to config.yaml."""
    measured = pretended(FAST_SDPA)
    task = task_of()
    assert task.run.flat()["tune"] == "auto"
    said = decided(task)
    assert {(str(p), p.batch) for p in measured} == {(ENCODER, 4), (DECODER, 4)}
    assert "measuring 2 operations on" in said[0]
    assert "at most 60 s" in said[0]
    assert "[2/2]" in said[2]
    assert backends(task) == ({5: "sdpa", 0: "narrow"}, {17: "sdpa", 0: "narrow"})
    text = f"{ENCODER}=sdpa, {DECODER}=sdpa"
    assert (task.run.flat()["tune"], task.run.flat()["attention"]) == (text, "auto")
    # What config.yaml then holds asks for the same, whatever is fast.
    pretended(FAST_NARROW)
    again = task_of(tune=text)
    assert decided(again) == []
    assert backends(again) == backends(task)
    second = task_of()
    assert decided(second) == []
    assert backends(second) == backends(task)
    assert len(measured) == 2


def test_again_measures_anew(pretended):
    pretended(FAST_SDPA)
    decided(task_of())
    measured = pretended(FAST_NARROW)
    task = task_of(tune="again")
    decided(task)
    assert len(measured) == 2
    assert backends(task) == ({5: "math", 0: "narrow"}, {17: "narrow", 0: "narrow"})


@pytest.mark.parametrize("flags", [{"tune": "off"}, {"attention": "sdpa"}, {"compile": False}])
def test_where_the_flags_decide_nothing_is_measured(pretended, flags):
    measured = pretended(FAST_SDPA)
    task = task_of(**flags)
    word = task.run.compute.attention
    assert decided(task) == []
    assert (measured, backends(task)) == ([], (word, word))
    assert (task.run.flat()["tune"], task.run.flat()["attention"]) == ("off", word)


@pytest.mark.parametrize("tune", [f"{DECODER}=sdpa", "off", None])
def test_a_resumed_run_computes_as_it_began(pretended, tune):
    """Must fail for: the machine's memory before the checkpoint; a checkpoint without the entry measured."""
    pretended(FAST_NARROW)
    decided(task_of())
    task = task_of()
    (line,) = decided(task, state=resumed(tune))
    assert line.startswith(f"tune: as the resumed run began: {tune or 'off'}; --tune again measures anew")
    assert task.run.flat()["tune"] == (tune or "off")
    assert backends(task) == ("narrow", {17: "sdpa", 0: "narrow"} if tune == f"{DECODER}=sdpa" else "narrow")
    task = task_of(tune="again")
    decided(task, state=resumed(tune))
    assert backends(task)[1] == {17: "narrow", 0: "narrow"}
    # Parameters of another run are no run to go on with.
    task = task_of()
    assert decided(task, state={"model": {}}) == []
    assert backends(task)[1] == {17: "narrow", 0: "narrow"}


def test_a_choice_that_does_not_exist_here_is_said_and_left_to_the_default(pretended):
    task = task_of(tune=f"{ENCODER}=short/rows32, {DECODER}=sdpa, mlp 192x768 bf16=triton")
    assert decided(task) == [f"tune: {ENCODER}: short/rows32 does not exist here; it computes with the default"]
    assert backends(task) == ("narrow", {17: "sdpa", 0: "narrow"})
    assert task.run.flat()["tune"] == f"{DECODER}=sdpa"


def test_one_process_measures_and_all_take_its_choice(pretended):
    """Ranks that would choose differently.  Must fail for: every rank takes its own."""
    told: list[str] = []

    class Other(World):
        def agreed(self, text: str) -> str:
            told.append(text)
            return told[0]

    pretended(FAST_SDPA)
    first, second = task_of(), task_of()
    decided(first, Other(rank=0, size=2))
    measured = pretended(FAST_NARROW)
    decided(second, Other(rank=1, size=2))
    assert (measured, backends(second)) == ([], backends(first))
    assert told == [f"{ENCODER}=sdpa, {DECODER}=sdpa", ""]


def test_without_memory_for_the_reference_fewer_images_are_measured(pretended, monkeypatch):
    measured: list[int] = []

    def bench(problem: Problem, *_) -> Pretend:
        measured.append(problem.batch)
        if problem.batch > 1:
            raise OUT_OF_MEMORY
        return Pretend(FAST_SDPA[str(problem)])

    monkeypatch.setattr(decisions, "Workbench", bench)
    task = task_of()
    decided(task)
    assert measured == [4, 2, 1] * 2
    assert backends(task)[0] == {5: "sdpa", 0: "narrow"}


def test_a_new_candidate_is_measured(pretended, monkeypatch):
    """A package that was installed since.  Must fail for: a problem that is known is not measured."""
    pretended(FAST_SDPA)
    decided(task_of())
    candidates_of = decisions.candidates_of
    monkeypatch.setattr(decisions, "candidates_of", lambda *a: [Candidate("xformers"), *candidates_of(*a)])
    measured = pretended({name: table | {"xformers": 0.1} for name, table in FAST_SDPA.items()})
    task = task_of()
    decided(task)
    assert len(measured) == 2
    assert backends(task)[0] == {5: "xformers", 0: "narrow"}


def test_a_file_that_nobody_can_write_costs_a_line(pretended, tmp_path):
    pretended(FAST_SDPA)
    task = task_of()
    environment = decisions.environment_of(torch.device("cpu"), task.run)
    path = file_of(environment)
    path.mkdir()
    said = decided(task)
    assert [line for line in said if "not kept" in line] == [said[3]]
    assert f"{path} is not used: it cannot be read (IsADirectoryError" in said[0]
    assert said[3].startswith("tune: what was measured is not kept: tune: could not write")
    assert backends(task)[0] == {5: "sdpa", 0: "narrow"}
