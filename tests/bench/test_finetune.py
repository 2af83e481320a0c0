"""bench on the fine-tuning step: hand-counted products, records, tables, wrong arguments, the pretend GPU."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench.__main__ import main
from bench.model_flops import model_flops
from bench.rows import load
from bench.step.roofline import price_all
from bench.step.trace import record
from bench.step.variants import build_step, configuration
from mimir_fast.config.finetuning import FinetuneConfig
from mimir_fast.models.families.vit import VIT
from tests.bench.records import step
from tests.support.runs import make_images

ROOT = Path(__file__).parents[2]
WRAPPER = ROOT.parent / "shared" / "tools" / "drygpu" / "drygpu"  # an outside program, where it is there
PAGE = "docs/performance.md"
TINY = {"embed_dim": 48, "depth": 2, "num_heads": 3}
WORDS = "--model vit_ti --batch_size 2 --input_size 32 --patch_size 8 --nb_classes 7 --device cpu --attention math"
CONFIG = FinetuneConfig().flat() | {"model": "vit_base", "batch_size": 256, "patch_size": 16, "precision": "bf16"}
CONFIG |= {"attack_train": "pgd", "steps": 1, "compile": True, "residual_dtype": "bf16"}


def tuning(bound: float, **fields) -> dict:
    """A priced fine-tuning step."""
    return step(bound, task="finetune", **{"config": CONFIG, **fields})


def expected_flops(steps: int, attention: bool = True) -> int:
    """Products of a step of the tiny model by hand; a multiply-add is two.

    The attack: per step a forward pass and the input's gradient, once more the same, for attention (whose products have two
    factors that depend on the input) twice.  Training: a forward pass and both gradients, of the patches' projection the
    weight's only.
    """
    B, L, T, D, F, P, classes, depth = 2, 16, 17, 48, 192, 3 * 8 * 8, 7, 2
    linear = depth * (2 * T * D * 3 * D + 2 * T * D * D + 2 * 2 * T * D * F) + 2 * D * classes
    patches, attended = 2 * L * P * D, depth * 2 * 2 * T * T * D
    passes = (2 * steps + 3) * linear + (2 * steps + 2) * patches
    return B * (passes + attention * (3 * steps + 3) * attended)


@pytest.fixture
def priced(monkeypatch):
    """What a step of the tiny model on the CPU costs."""
    monkeypatch.setitem(VIT.sizes, "vit_ti", TINY)

    def run(variant: str, *words: str) -> list:
        config = configuration(variant, [*WORDS.split(), *words], "finetune")
        return [
            p for parts in price_all(record(build_step(variant, config, torch.device("cpu")), "cpu")) for p in parts
        ]

    return run


@pytest.mark.parametrize("steps", [1, 3])
def test_the_products_are_those_counted_by_hand(priced, steps):
    prices = priced("ours", "--no_compile", "--steps", str(steps))
    assert sum(sum(p.flops.values()) for p in prices) == expected_flops(steps)
    assert {p.kind for p in prices} == {"GEMM", "AdamW", "copies", "other ATen"}
    assert [p.name for p in prices if p.why] == []


def test_the_textbook_does_the_same_work(priced):
    prices = priced("textbook", "--steps", "2")
    products = [p for p in prices if p.kind == "GEMM"]
    assert sum(sum(p.flops.values()) for p in products) == expected_flops(
        2, attention=False
    )  # a kernel of its own on a CPU


def test_flops_per_image_are_the_same_whatever_computes_them(monkeypatch):
    monkeypatch.setitem(VIT.sizes, "vit_ti", TINY)
    config = configuration("ours", [*WORDS.split(), "--activation_checkpointing", "--steps", "2"], "finetune")
    assert model_flops(config) == expected_flops(2) / 2


def test_the_training_loop_is_the_fine_tuners(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(VIT.sizes, "vit_ti", TINY)
    results = tmp_path / "train.jsonl"
    words = (
        "train --task finetune --model vit_ti --batch 4 --input_size 16 --patch_size 8 --warmup 1 --updates 3".split()
    )
    words += ["--data_root", str(make_images(tmp_path / "data")), "--results", str(results)]
    assert main([*words, "--", "--device", "cpu", "--num_workers", "0"]) == 0, capsys.readouterr().err
    (row,) = load(results)
    assert row.record["task"] == "finetune"
    assert row.subject["config.layer_decay"] == 0.65
    assert {"data", "prepare", "attack", "encoder", "loss", "backward", "optimizer", "rest"} == set(
        row.record["stages"]
    )
    assert row.readings["images/s"].value > 0


def test_the_configuration_is_the_recipes():
    config = configuration("ours", ["--device", "cpu", "--model", "vit_base"], "finetune").flat()
    wanted = {"attack_train": "pgd", "steps": 1, "eps": 4.0, "smoothing": 0.1, "drop_path": 0.1, "layer_decay": 0.65}
    assert wanted.items() <= config.items()
    assert (config["batch_size"], config["input_size"], config["nb_classes"]) == (256, 224, 1000)
    assert not configuration("textbook", ["--device", "cpu", "--compile"], "finetune").compute.compile


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        ("--steps 0", "steps: expected 1 or more, got 0"),
        ("--batch 0", "batch: expected 1 or more, got 0"),
        ("--pretend /no/such/wrapper", "pretend: no file /no/such/wrapper"),
    ],
)
def test_wrong_arguments(words, complaint, capsys):
    assert main(["step", "--task", "finetune", *words.split()]) == 2
    assert complaint in capsys.readouterr().err


def test_the_textbooks_pretraining_step_attacks_once():
    config = configuration("textbook", ["--device", "cpu", "--steps", "2"])
    with pytest.raises(ValueError, match=r"steps: .* got 2"):
        build_step("textbook", config, torch.device("cpu"))


# ---- records


def test_rows_of_both_tasks_are_told_apart(tmp_path, capsys):
    files = [tmp_path / name for name in ("a.jsonl", "b.jsonl")]
    old = step(40.0)  # of before there was another task
    for file, rows in zip(files, ([old, tuning(90.0)], [step(40.0, task="pretrain"), tuning(91.0)])):
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (first, second), (again, _) = map(load, files)
    assert first.key() == again.key() != second.key()
    assert second.subject["config.layer_decay"] == 0.75
    short = tuning(1.0) | {"config": {n: v for n, v in CONFIG.items() if n != "layer_decay"}}  # a flag it did not have
    files[1].write_text(json.dumps(short) + "\n" + json.dumps(tuning(91.0)) + "\n")
    assert [row.key() for row in load(files[1])] == [second.key()] * 2
    files[1].write_text(json.dumps(step(40.0)) + "\n" + json.dumps(tuning(91.0)) + "\n")
    assert main(["compare", *map(str, files)]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("REGRESSION  step: variant ours, model vit_base, batch_size 256")
    assert "task finetune" in lines[0]
    assert "bound ms 90 -> 91" in lines[1]


# ---- tables


@pytest.fixture
def page(tmp_path, capsys):
    """Writes the report of some records into a copy of the pages; gives README and the page."""
    root, results = tmp_path / "root", tmp_path / "results"
    (root / "docs").mkdir(parents=True)
    results.mkdir()
    for name in ("README.md", PAGE):
        shutil.copy(ROOT / name, root / name)

    def run(records: list[dict]) -> tuple[str, str, Path]:
        (results / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in records))
        assert main(["report", "--root", str(root), "--results", str(results)]) == 0, capsys.readouterr().err
        return (root / "README.md").read_text(), (root / PAGE).read_text(), root / "docs" / "plots"

    return run


def table(text: str, name: str) -> list[dict[str, str]]:
    block = re.search(rf"<!-- bench:{name} -->\n(.*?)<!-- /bench:{name} -->", text, re.DOTALL)[1]
    lines = [line.strip("| ").split(" | ") for line in block.splitlines() if line.startswith("| ")]
    return [dict(zip(lines[0], cells)) for cells in lines[2:]]


def test_fine_tuning_has_tables_of_its_own(page):
    rival = CONFIG | {"residual_dtype": "fp32", "compile": False}
    rows = [step(40.0), tuning(90.0), tuning(300.0, config=CONFIG | {"steps": 10})]
    rows += [tuning(150.0, variant="textbook", config=rival), tuning(200.0, peaks="a100", device="pretend-a100")]
    _, text, plots = page(rows)
    found = [(row["model"], row["step"], row["for"], row["bound ms"]) for row in table(text, "finetune-bounds")]
    assert found == [
        ("ViT-B/16", "mimir_fast, PGD-1", "H100", "90.0"),
        ("ViT-B/16", "textbook, PGD-1", "H100", "150.0"),
        ("ViT-B/16", "mimir_fast, PGD-10", "H100", "300.0"),
        ("ViT-B/16", "mimir_fast, PGD-1", "A100", "200.0"),
    ]
    assert "steps" not in table(text, "finetune-bounds")[2]["configuration"]
    assert [row["step"] for row in table(text, "finetune-shares")] == [row[1] for row in found[:3]]
    assert [row["bound ms"] for row in table(text, "bounds")] == ["40.0"]
    assert len(table(text, "published")) == 4  # theirs
    assert "mimir_fast, PGD-10" in (plots / "finetune_shares.svg").read_text()
    states = {row["figure"]: row["state"] for row in table(text, "status")}
    assert states["bound, launches, memory of a fine-tuning step"] == "bound"
    assert states["time of a fine-tuning step on a GPU"] == "unknown"


def test_the_readme_names_the_bound_of_both(page):
    bf16 = tuning(0)["config"] | {"model": "mae_vit_base"}
    pretraining = step(40.0)
    pretraining["config"] = pretraining["config"] | {"residual_dtype": bf16["residual_dtype"]}
    textbook = tuning(150.0, variant="textbook", config=CONFIG | {"compile": False, "residual_dtype": "fp32"})
    ten = tuning(300.0, config=CONFIG | {"steps": 10})
    readme = page([pretraining, tuning(90.0), textbook, ten])[0]
    line = re.search(r"<!-- bench:headline -->\n(.*?)\n<!--", readme, re.DOTALL)[1]
    assert (
        "Bound of one step, ViT-B/16 on an H100 (batch 512, 224 px, bf16, bf16 residual, compiled): 40.0 ms. " in line
    )
    assert "Bound of one fine-tuning step, ViT-B/16 with PGD-1 on an H100 (batch 256" in line
    assert "compiled): 90.0 ms; textbook (batch 256, 224 px, bf16, fp32 residual, eager): 150.0 ms. A bound" in line
    assert "300" not in line


def test_measured_steps_have_a_table_and_pretend_ones_do_not_get_into_it(page, tmp_path, capsys):
    text = page([step(40.0), tuning(90.0, ms=120.0)])[1]
    assert [(row["step"], row["ms"]) for row in table(text, "finetune-steps")] == [("mimir_fast, PGD-1", "120.00")]
    assert table(text, "steps") == []
    (tmp_path / "results" / "rows.jsonl").write_text(json.dumps(tuning(90.0, ms=120.0, device="pretend-h100")) + "\n")
    words = ["report", "--root", str(tmp_path / "root"), "--results", str(tmp_path / "results")]
    assert main(words) == 2
    assert "pretend-h100 has no times" in capsys.readouterr().err


def test_on_the_pretend_gpu_nobody_waits(tmp_path):
    if not WRAPPER.exists():
        pytest.skip(f"no pretend GPU at {WRAPPER}")
    results = tmp_path / "step.jsonl"
    command = [sys.executable, "-m", "bench", "step", "--task", "finetune", "--steps", "2", "--pretend", str(WRAPPER)]
    command += "--model vit_ti --batch 2 --input_size 32 --patch_size 8".split()
    command += ["--results", str(results), "--", "--no_compile", "--residual_dtype", "bf16"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (found,) = map(json.loads, results.read_text().splitlines())
    assert (found["task"], found["config"]["steps"]) == ("finetune", 2)
    assert found["totals"]["syncs"] == found["totals"]["to_host"] == 0
    assert found["unpriced"] == []
    assert {"linf_start", "add_layer_norm", "short_attention", "linear_gelu"} <= set(found["ours"])
    assert "finetune, ours: vit_ti 32/8, batch 2, attack 2 step(s)" in done.stdout
