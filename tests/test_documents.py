"""README, CONTRIBUTING and docs/ name files, tests and flags that exist; the README stays short and its example runs."""

import importlib
import importlib.util
import re
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import mimir_fast
from mimir_fast.config.analysis import AnalyzeConfig
from mimir_fast.config.cache import CacheConfig
from mimir_fast.config.evaluation import EvaluateConfig
from mimir_fast.config.export import ExportConfig
from mimir_fast.config.fields import Configuration
from mimir_fast.config.finetuning import FinetuneConfig
from mimir_fast.config.pretraining import PretrainConfig

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("examples/*.md")])
FOLDERS = "mimir_fast|kernels|bench|tests|docs|examples"
# flags of other programs, and of the verbs that have no configuration
ELSEWHERE = {
    "nproc_per_node",
    "gpu",
    "memory_gib",
    "task",
    "seed",
    "recipe",
    "config",
    "aa_images",
    "processes",
    "study",
    "export",
    "import",
}
CONFIGURATIONS = (PretrainConfig, FinetuneConfig, EvaluateConfig, AnalyzeConfig, ExportConfig, CacheConfig)


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


def words(page: Path) -> str:
    """A page's text; the first column of the changelog's tables is history; OP and FAMILY stand for any of them."""
    text = re.sub(r"(?<=[/_])OP(?=[/.])", "short_attention", page.read_text()).replace("/FAMILY/", "/vit/")
    return re.sub(r"^ *\|[^|]*\|", "|", text, flags=re.MULTILINE) if page.name == "CHANGELOG.md" else text


def test_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 130


def test_readme_example_runs(tmp_path):
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_training_from_python(monkeypatch):
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "pretrain.md").read_text(), re.DOTALL)
    asked = []
    monkeypatch.setattr(mimir_fast, "train", asked.append)
    exec(code, {})
    assert asked[0].check().attack.attack == "pgd_mae"


def test_the_picture_can_be_drawn():
    draw = runpy.run_path(str(ROOT / "docs" / "figures" / "draw_method.py"))["draw"]
    images = np.random.default_rng(0).random((3, 3, 8, 8), dtype=np.float32)
    samples = {"clean": images, "adv": images + 0.01, "recon": images, "mask": np.eye(3, 4), "patch_size": np.array(4)}
    figure = draw(samples)
    assert [ax.get_title() for ax in figure.axes[:6]][3] == "the encoder sees"
    seen = figure.axes[3].images[0].get_array()
    assert (seen[:4, :4] == 0.5).all()
    assert np.allclose(seen[4:, 4:], (images[0, :, 4:, 4:] + 0.01).transpose(1, 2, 0).clip(0, 1))


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_paths_exist(page):
    text = words(page)
    for path in re.findall(rf"`((?:{FOLDERS})/[\w./-]*)`", text):
        assert (ROOT / path).exists(), path
    for link in re.findall(r"\]\(([^)#]+)[^)]*\)", text):
        if not link.startswith("http"):
            assert (page.parent / link).exists(), link


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_modules_exist(page):
    for dotted in re.findall(
        r"\b(mimir_fast(?:\.[a-z_]+)+)\b(?!\.[a-z]*\()", re.sub(r"`mimir_fast\.kernels\.OP", "", words(page))
    ):
        assert resolves(dotted), dotted


def resolves(dotted: str) -> bool:
    """Whether a dotted name is a module, or a name in one."""
    try:
        if importlib.util.find_spec(dotted):
            return True
    except ModuleNotFoundError:
        return False
    module, _, attribute = dotted.rpartition(".")
    return hasattr(importlib.import_module(module), attribute)


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_anchors_exist(page):
    for link, anchor in re.findall(r"\]\(([^)#]*)#([^)]+)\)", words(page)):
        target = page.parent / link if link else page
        if link.startswith("http"):
            continue
        titles = re.findall(r"^#+ (.*)$", target.read_text(), re.MULTILINE)
        assert anchor in [re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in titles], anchor


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_tests_exist(page):
    source = "\n".join(path.read_text() for path in ROOT.glob("tests/**/test_*.py"))
    for test in re.findall(r"`(test_\w+)`", words(page)):
        assert f"def {test}(" in source, test
    for stale in re.findall(r"`(test_\w+\.py\S*)`", words(page)):
        pytest.fail(f"{stale}: name its path below the repository's root")


def flags(config: type[Configuration]) -> set[str]:
    return {flag for name in config.flags() for flag in (name, f"no_{name}")}


# performance.md speaks of flags of python -m bench
@pytest.mark.parametrize("page", [p for p in PAGES if p.name != "performance.md"], ids=name)
def test_flags_exist(page):
    known = set().union(*map(flags, CONFIGURATIONS)) | ELSEWHERE | {"cls_token"}
    for flag in re.findall(
        r"(?<![\w-])--([a-z_]+)(?![\w-])", re.sub(r"`(python -m bench|pytest)[^`]*`", "", words(page))
    ):
        assert flag in known, flag


@pytest.mark.parametrize(("page", "config"), [("pretrain", PretrainConfig), ("finetune", FinetuneConfig)])
def test_every_flag_of_ours_has_its_line(page, config):
    text = (ROOT / "docs" / f"{page}.md").read_text()
    shared = PretrainConfig.flags().keys() if config is FinetuneConfig else set()
    for flag, field in config.flags().items():
        if field.metadata["new"] and flag not in shared:
            assert f"--{flag}" in text, flag
