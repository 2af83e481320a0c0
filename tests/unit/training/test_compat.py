"""--compat: a resumed run goes on with the model that it began with."""

import argparse

import pytest

from mimir_fast.config.choices import NONE, ORIGINAL
from mimir_fast.config.pretraining import PretrainConfig
from mimir_fast.config.resolve import resolve
from mimir_fast.models import create_model
from mimir_fast.training.options import model_options, same_compat
from tests.support.golden import small_model

SIZES = {"img_size": 16, "patch_size": 4, "embed_dim": 4, "depth": 2, "num_heads": 2, "local_up_to_layer": 1}


def model(compat: str | None):
    return create_model("convit", **SIZES, decoder_embed_dim=16, decoder_depth=1, decoder_num_heads=2, compat=compat)


def told(state: dict, resumed) -> list[str]:
    said: list[str] = []
    same_compat(state, resumed, said.append)
    return said


def test_the_flag_reaches_the_model():
    for word, keyword in ((NONE, None), (ORIGINAL, ORIGINAL)):
        run = resolve(PretrainConfig().updated({"device": "cpu", "compat": word}), set())
        assert model_options(run)["compat"] == keyword


def test_a_checkpoint_that_does_not_say_may_be_the_originals():
    args = argparse.Namespace(model="mae_convit_tiny_dec128d2b")
    (line,) = told({"model": {}, "args": args}, model(None))
    assert "if it is the original's, --compat original goes on as it began" in line
    assert not told({"model": {}, "args": args}, model(ORIGINAL))
    # To a ViT the flag makes no difference, and a new run resumes nothing.
    assert not told({"model": {}, "args": args}, small_model())
    assert not told({}, model(None))


@pytest.mark.parametrize(("was", "now"), [(NONE, ORIGINAL), (ORIGINAL, None)])
def test_another_word_than_the_runs_is_an_error(was, now):
    state = {"model": {}, "args": argparse.Namespace(compat=was)}
    with pytest.raises(ValueError, match=f"compat: the resumed run had --compat {was}, this one has {now or NONE}"):
        same_compat(state, model(now), print)
    assert not told({"model": {}, "args": {"compat": was}}, model(None if was == NONE else was))
