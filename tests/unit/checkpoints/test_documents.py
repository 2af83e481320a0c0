"""docs/checkpoints.md: its examples run on files of real runs, and its tables name what is in them."""

import re
import shutil
from pathlib import Path

import pytest
import torch

from mimir_fast.checkpoints.trained_models import latent_tokens, load_classifier, load_mae
from tests.support.finetune_runs import finetune, load, make_data
from tests.support.runs import run

pytestmark = pytest.mark.slow

PAGE = (Path(__file__).parents[3] / "docs" / "checkpoints.md").read_text()
BARE, CLASSIFIER, ENCODER, OURS = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A folder with one update of a pre-training in mae/ and of a fine-tuning in vit/, under the names of the page."""
    root = tmp_path_factory.mktemp("runs")
    data = make_data(root / "data")
    assert run(data, root / "mae", "--max_steps 1 --model mae_vit_ti") == 0
    assert finetune(data, root / "vit", "--max_steps 1 --model_ema") == 0
    for folder in ("mae", "vit"):
        for name in ("checkpoint-99.pth", "best.pth"):
            shutil.copy(root / folder / "resume-0-1.pth", root / folder / name)
    return root


def executed(code: str) -> dict:
    """The names that an example leaves; vit_ti stands for vit_base."""
    names: dict = {}
    exec(code.replace("vit_base", "vit_tiny"), names)
    return names


def test_a_classifier_in_pytorch_and_timm(runs, monkeypatch):
    monkeypatch.chdir(runs / "vit")
    names, ours = executed(BARE + CLASSIFIER), executed(OURS)["trained"]
    assert names["args"].model == "vit_ti"
    images = torch.rand(2, 3, 16, 16)
    with torch.no_grad():
        logits = names["model"].eval()(images)
        torch.testing.assert_close(logits, ours.model(images), rtol=1e-4, atol=1e-5)
        plain = load_classifier("best.pth").model
    assert ours.source == "best.pth (model_ema)"
    assert torch.equal(plain.head.weight, names["checkpoint"]["model_ema"]["head.weight"])


def test_an_encoder_in_timm(runs, monkeypatch):
    monkeypatch.chdir(runs / "mae")
    names, images = executed(BARE + ENCODER), torch.rand(2, 3, 16, 16)
    with torch.no_grad():
        tokens = names["model"].eval().forward_features(images)
        torch.testing.assert_close(tokens, latent_tokens(load_mae("best.pth"), images), rtol=1e-4, atol=1e-5)


def first_column(title: str) -> list[str]:
    """The names in the first column of the table whose first head is `title`."""
    (table,) = re.findall(rf"^\| {re.escape(title)} \|.*\n\|[ \-|]*\n((?:\|.*\n)+)", PAGE, re.MULTILINE)
    return [name for line in table.splitlines() for name in re.findall(r"`([^`]+)`", line.split("|")[1])]


def test_the_tables_name_all_entries(runs):
    states = [load(runs / folder / "best.pth") for folder in ("mae", "vit")]
    named = first_column("entry")
    assert {key for state in states for key in state} | {"batch"} == set(named)
    assert [key for key in states[0] if key in named[:5]] == named[:5]
    keys = {key for state in states for key in state["mimir_fast"]}
    assert keys == set(first_column("key in `mimir_fast`"))


def test_the_table_names_all_files_of_a_run(runs):
    named = "|".join(
        re.escape(name).replace("E", r"\d+").replace("S", r"\d+") for name in first_column("file") if "/" not in name
    )
    written = {path.name for folder in ("mae", "vit") for path in (runs / folder).iterdir() if path.is_file()}
    assert {name for name in written if not re.fullmatch(f"{named}|events.out.tfevents.*", name)} == set()
