"""Candidates on a pretend device: which one is taken, and what becomes of those that are wrong, raise, or are too late."""

import itertools

import pytest
import torch

from mimir_fast.tuning.budget import beyond_budget
from mimir_fast.tuning.measuring import NothingWorksError, Trial, fastest, measure, worst_part
from tests.support.pretend import ATTENTION, OUT_OF_MEMORY, Pretend, candidates


def measured(table: dict, **options) -> tuple[str, list[str], list[Trial]]:
    """The candidate taken, the lines said, all trials."""
    said: list[str] = []
    trials = measure(ATTENTION, candidates(*table), Pretend(table), said.append, rounds=3, **options)
    return str(fastest(trials)), said, trials


@pytest.mark.parametrize(
    ("table", "taken"),
    [
        ({"short": 3.0, "short/wide": 2.0, "sdpa": 4.0}, "short/wide"),
        # within 3 % the order decides, whichever of them happened to be the fastest
        ({"short": 1.029, "sdpa": 1.0}, "short"),
        ({"short": 1.0, "sdpa": 0.99}, "short"),
        ({"short": 1.031, "sdpa": 1.0}, "sdpa"),
        # a slow round decides nothing
        ({"short": [1.0, 90.0, 1.0], "sdpa": [1.5, 1.5, 1.5]}, "short"),
    ],
)
def test_the_fastest_is_taken_and_ties_go_to_the_first(table, taken):
    """Must fail for: min instead of median, TIE of 0, the order of times instead of that of candidates."""
    assert measured(table)[:2] == (taken, [])


@pytest.mark.parametrize(
    ("fault", "line"),
    [
        ("output: off by 3 at worst, eager by 0.1", "WRONG VALUES: output: off by 3 at worst, eager by 0.1"),
        (RuntimeError("no kernel\nfor this size"), "RuntimeError: no kernel"),
        (OUT_OF_MEMORY, "out of memory"),
    ],
)
def test_one_that_fails_is_out_and_said_to_be(fault, line):
    """Must fail for: a wrong one that is fast is taken."""
    taken, said, trials = measured({"short": fault, "sdpa": 2.0})
    assert (taken, said) == ("sdpa", [f"tune: attention 50x12x64 bf16: short is out: {line}"])
    assert [(t.seconds, t.why) for t in trials] == [(None, line), (2.0, "")]


def test_where_all_fail_nothing_is_taken():
    with pytest.raises(NothingWorksError, match="short: out of memory; sdpa: WRONG VALUES: off"):
        measured({"short": OUT_OF_MEMORY, "sdpa": "off"})


def test_the_time_box_ends_trying_but_one_is_measured():
    """Must fail for: the first candidate is not tried either."""
    clock = itertools.count().__next__
    taken, said, trials = measured({"a": 5.0, "b": 4.0, "c": 3.0}, ends=0, clock=clock)
    assert (taken, said) == ("b", [])
    assert trials[2].why == "not tried: the time is over"
    assert measured({"a": 5.0, "b": 4.0}, ends=-1)[0] == "a"


def test_candidates_take_turns():
    bench = Pretend({"a": 1.0, "b": 1.0})
    measure(ATTENTION, candidates("a", "b"), bench, print, rounds=3)
    assert bench.order == ["a", "b"] * 3


def test_values_are_held_to_the_budget():
    truth = {"output": torch.randn(3, 4, dtype=torch.float64), "gradient": torch.randn(5, dtype=torch.float64)}
    eager = {name: value.bfloat16() for name, value in truth.items()}
    assert worst_part(eager, eager, truth, beyond_budget) == ""
    broken = eager | {"gradient": torch.cat([eager["gradient"][:4], torch.tensor([7.0]).bfloat16()])}
    assert worst_part(broken, eager, truth, beyond_budget).startswith("gradient: off by")
