"""The demo: its command lines are valid, it stops where a command stops, and its page says what the results say."""

import json
import re
import sys

import pytest
import torch

from mimir_fast.cli.demo import main
from mimir_fast.cli.evaluate import COMMAND as EVALUATE
from mimir_fast.cli.finetune import FINETUNE
from mimir_fast.cli.parser import parse_args
from mimir_fast.cli.pretrain import PRETRAIN
from mimir_fast.config.resolve import resolve
from mimir_fast.demo import run as command
from mimir_fast.demo.arms import ARMS, Command, commands, places
from mimir_fast.demo.run import run_all
from mimir_fast.models import create_classifier, create_model
from mimir_fast.models.families import FAMILIES
from mimir_fast.training.options import model_options
from tests.unit.report.test_report import make_run, row

CONFIG = "model: vit_nano\ninput_size: 32\ndataset: digits\nseed: 7\n"
MAKE = (create_model, create_classifier)
COMMANDS = {"pretrain": PRETRAIN, "finetune": FINETUNE, "evaluate": EVALUATE}


def test_command_lines_are_valid_and_alike(tmp_path):
    plans = {arm: commands(arm, tmp_path, 3, 5) for arm in ARMS}
    flat = {arm: [parse_args(COMMANDS[s.verb], s.words)[0].flat() for s in plan] for arm, plan in plans.items()}
    assert [len(plan) for plan in plans.values()] == [3, 4, 4]
    for arm, configs in flat.items():
        tuned = next(c for c in configs if "attack_train" in c)
        assert (tuned["attack_train"], tuned["seed"], bool(tuned["finetune"])) == ("pgd", 3, arm.attack is not None)
        others = {k: v for k, v in tuned.items() if k not in ("finetune", "output_dir", "log_dir")}
        first = next(c for c in flat[ARMS[0]] if "attack_train" in c)
        assert others == {k: first[k] for k in others}
        assert [c["attacks"] for c in configs if "attacks" in c] == ["clean,pgd-20", "pgd-20,aa"]
    mae, mimir = (flat[arm][0] for arm in ARMS[1:])
    assert {key for key in mae if mae[key] != mimir[key]} == {"attack", "output_dir", "log_dir"}


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_any_family(family, tmp_path):
    """Its autoencoder, then its classifier, at a size that both take, here without parameters' memory."""
    name, side = family.names(False)[0], 128 if family.name == "swin" else 32
    pretraining, tuning, _ = commands(ARMS[2], tmp_path, 0, 0, name, side)
    runs = [resolve(*parse_args(kind, c.words)) for kind, c in ((PRETRAIN, pretraining), (FINETUNE, tuning))]
    assert [run.config.model.model for run in runs] == [f"mae_{name}", name]
    with torch.device("meta"):
        encoder, classifier = (make(run.config.model.model, **model_options(run)) for make, run in zip(MAKE, runs))
    assert encoder.kept(runs[0].config.model.mask_ratio) >= 1
    assert classifier.img_size == side


def test_checkpoints_are_where_the_next_command_looks(tmp_path):
    pretraining, tuning, *rest = commands(ARMS[2], tmp_path, 0, 0)
    assert str(pretraining.product) == tuning.words[tuning.words.index("--finetune") + 1]
    assert str(tuning.product) == rest[0].words[rest[0].words.index("--checkpoint") + 1]
    epochs = parse_args(FINETUNE, tuning.words)[0].optim.epochs
    assert tuning.product.name == f"checkpoint-{epochs - 1}.pth"


def test_ends_where_a_command_ends(tmp_path, monkeypatch, capsys):
    seen = []

    def verb(words):
        seen.append(words[0])
        if words[0] != "killed":
            (tmp_path / words[0]).touch()
        return {"fails": 2}.get(words[0], 0)

    monkeypatch.setattr(command, "VERBS", {"pretrain": verb})
    plan = [Command(name, "pretrain", [name], tmp_path / name, 1) for name in ("good", "fails", "never")]
    assert run_all(plan) == 2
    assert seen == ["good", "fails"]
    assert "[2/3, about" in capsys.readouterr().out
    assert run_all([Command("killed", "pretrain", ["killed"], tmp_path / "killed", 1), plan[2]]) == 143
    assert seen[2:] == ["killed"]
    assert run_all(plan[:1]) == 0


@pytest.fixture
def finished(tmp_path):
    """Folders of a finished demo, its numbers made up."""
    for number, arm in enumerate(ARMS):
        at = places(arm, tmp_path)
        at.fine_tuning.mkdir(parents=True)
        if arm.attack:
            make_run(at.pretraining, [row(i) for i in range(1, 9)], config=CONFIG)
        keys = ("update", "epoch", "x", "loss", "lr", "images_per_s", "data_wait", "peak_memory_gib", "skipped_steps")
        tuned = [{key: row(i)[key] for key in keys} for i in range(1, 9)]
        make_run(at.fine_tuning, tuned, samples=False, config=CONFIG)
        wide, narrow = (at.evaluation, ("clean", "pgd-20"), 297), (at.autoattack, ("clean", "pgd-20", "aa"), 8)
        for folder, attacks, count in (wide, narrow):
            folder.mkdir()
            settings = {"eps": 8.0, "alpha": 1.0, "restarts": 1, "seed": 7}  # a person's, not the demo's
            entries = {name: {"settings": {"attack": name, **settings}} for name in attacks if name != "clean"}
            for i, name in enumerate(attacks):
                mine = {"attack": name} if name == "clean" else {"attack": name, **settings, "eps": 4.0}
                accuracy = 0.5 + number / 10 - 0.01 * i
                entries[f"{name}, ours"] = {"settings": mine, "accuracy": accuracy, "n": count, "interval95": [0.2, 0.9]}
            (folder / "results.json").write_text(json.dumps({"attacks": entries}))
    return tmp_path


def test_page(finished, monkeypatch, capsys):
    monkeypatch.setattr(command, "run_all", lambda plan: 0)
    monkeypatch.setattr(command, "refusal", lambda num_classes: "")
    assert main(["--output_dir", str(finished), "--seed", "7", "--aa_images", "8"]) == 0
    assert f"report: {finished / 'report.html'}" in capsys.readouterr().out
    text = re.sub(r'src="[^"]*"', "", (finished / "report.html").read_text())
    for words in (
        "<th>MIMIR</th><td>70.0 % (20.0 to 90.0, n = 297)</td><td>69.0 % (20.0 to 90.0, n = 297)</td>"
        "<td>69.0 % (20.0 to 90.0, n = 8)</td>",
        "seed 7",
        "AutoAttack",
        "AutoAttack: 8 of them, beside PGD-20 on the same ones",
        "<th>PGD-20, those 8</th><th>AutoAttack</th>",
        '<a href="mimir/pretraining/report.html">',
    ):
        assert words in text
    assert text.count("<figure>") == 1 + 3 + 2 * 2
    links = re.findall('href="([^"]*)"', text)
    assert len(links) == 5
    assert all((finished / link).exists() for link in links)


def test_another_seed_is_refused(finished, monkeypatch, capsys):
    monkeypatch.setattr(command, "run_all", lambda plan: 130)
    assert main(["--output_dir", str(finished), "--seed", "7"]) == 130
    assert main(["--output_dir", str(finished), "--seed", "7", "--model", "cait_xxs24"]) == 2
    assert "model: got cait_xxs24, expected vit_nano, which" in capsys.readouterr().err
    assert main(["--output_dir", str(finished)]) == 2
    assert f"seed: got 0, expected 7, which {finished} was begun with" in capsys.readouterr().err


def test_without_autoattack(finished, monkeypatch, capsys):
    plans = []
    monkeypatch.setattr(command, "run_all", lambda plan: plans.append(plan) or 0)
    monkeypatch.setitem(sys.modules, "pyautoattack", None)
    assert main(["--output_dir", str(finished), "--seed", "7"]) == 0
    assert "mimir-fast[eval]" in capsys.readouterr().out
    assert not any("AutoAttack" in command.title for command in plans[0])
    assert "AutoAttack" not in (finished / "report.html").read_text()
    assert main(["--seed", "-1"]) == 2
    assert "seed: got -1" in capsys.readouterr().err
