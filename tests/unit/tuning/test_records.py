"""Choices as text, and the figures of problems."""

import pytest

from mimir_fast.tuning.records import Candidate, Problem, as_text, check_tune, from_text
from tests.support.pretend import ATTENTION, MLP


def test_choices_are_a_line_of_text_and_back():
    choices = {ATTENTION.place: Candidate("short", "rows32"), MLP.place: Candidate("reference")}
    text = as_text(choices)
    assert text == "attention 50x12x64 bf16=short/rows32, mlp 768x3072 bf16=reference"
    assert from_text(text) == choices
    for word in ("auto", "off", "again", text):
        check_tune(word)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("of", "got 'of', expected auto, off, again or choices"),
        ("attention 50x12 bf16=short", "expected tokens x heads x numbers per head"),
        ("norm 768 bf16=triton", "got 'norm 768 bf16=triton'"),
        ("mlp 768x3072 int8=triton", "got 'mlp"),
        ("mlp 768x3072 bf16=triton; mlp 1x1 bf16=triton", "got 'mlp"),
        ("", "got ''"),
    ],
)
def test_other_text_is_refused(text, named):
    with pytest.raises(ValueError, match=f"^tune: .*{named}"):
        check_tune(text)


def test_work_of_a_problem():
    assert MLP.flops == 6 * 2 * 25600 * 768 * 3072
    assert ATTENTION.flops == 7 * 2 * 512 * 12 * 50 * 50 * 64
    assert ATTENTION.bytes == 11 * 2 * 512 * 50 * 768
    assert Problem("attention", (50, 12, 64), "fp32", 512).bytes == 2 * ATTENTION.bytes
