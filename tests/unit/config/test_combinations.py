"""Flags together: what cannot do as it says has a line, errors name flag, value and what is allowed, ~ is the home folder."""

import argparse
import math
from dataclasses import fields

import pytest

from mimir_fast.cli.analyze import COMMAND as ANALYZE
from mimir_fast.cli.demo import build_parser as demo_parser
from mimir_fast.cli.evaluate import COMMAND as EVALUATE
from mimir_fast.cli.export import COMMAND as EXPORT
from mimir_fast.cli.finetune import FINETUNE
from mimir_fast.cli.parser import parse_args
from mimir_fast.cli.pretrain import PRETRAIN
from mimir_fast.config.evaluation import EvaluateConfig
from mimir_fast.config.fields import home_path
from mimir_fast.config.finetuning import FinetuneConfig
from mimir_fast.config.pretraining import PretrainConfig
from mimir_fast.config.resolve import Machine, resolve
from mimir_fast.config.sections import OptimConfig
from mimir_fast.models.families import find
from mimir_fast.training.describe import schedule_notes

CPU = Machine(0, lambda: None)
COMMANDS = {"pretrain": PRETRAIN, "finetune": FINETUNE, "evaluate": EVALUATE, "analyze": ANALYZE, "export": EXPORT}


def notes(command, line: str) -> list[str]:
    config, explicit = parse_args(command, line.split())
    return config.notes(explicit)


IDLE = [
    (PRETRAIN, "--attack pgd_mae --steps 0", "steps: 0: the attack moves no image"),
    (PRETRAIN, "--attack pgd_mae --alpha 0", "alpha: 0: the attack never leaves its random start"),
    (PRETRAIN, "--attack pgd_mae --eps 0", "eps: 0: adversarial images are the clean ones"),
    (PRETRAIN, "--attack pgd_mae --mi_train hsic --mi_xpl 0", "mi_xpl: 0: hsic is computed and has no weight"),
    (PRETRAIN, "--attack_mask_ratio 0.5", "attack_mask_ratio: has no effect without --attack pgd_mae"),
    (PRETRAIN, "--mi_xpl 1", "mi_xpl: has no effect without --mi_train"),
    (PRETRAIN, "--aux_data_filename x.npz", "aux_data_filename: has no effect without --use_edm"),
    (PRETRAIN, "--epochs 5 --start_epoch 5", "start_epoch: 5 of 5 epochs: nothing is left to train"),
    (FINETUNE, "--attack_train pgd --steps 0", "steps: 0: the attack moves no image"),
    (FINETUNE, "--attack_train trades --alpha 0", "alpha: 0: the attack never leaves"),
    (
        FINETUNE,
        "--attack_train pgd --epochs 4 --eps_warmup_epochs 8",
        "eps_warmup_epochs: 8 of 4 epochs: eps ends at 3/255",
    ),
    (
        FINETUNE,
        "--attack_train pgd --epochs 5 --alpha_warmup_epochs 5",
        "alpha_warmup_epochs: 5 of 5 epochs: alpha ends at 1.6",
    ),
    (FINETUNE, "--eps_warmup_epochs 1", "eps_warmup_epochs: has no effect without an attack"),
    (
        FINETUNE,
        "--attack_train pgd --trades_beta 2",
        "trades_beta: has no effect without --attack_train trades or mart",
    ),
    (FINETUNE, "--attack_train pgd --alpha_end 1", "alpha_end: has no effect without --alpha_schedule"),
    (FINETUNE, "--mixup_mode elem", "mixup_mode: has no effect without --mixup or --cutmix"),
    (FINETUNE, "--reprob 0 --remode rand", "remode: has no effect without --reprob above 0"),
    (FINETUNE, "--model_ema_decay 0.9", "model_ema_decay: has no effect without --model_ema"),
    (FINETUNE, "--val_every 3", "val_every: has no effect without --val_attack, --held_out or --val_list"),
    (FINETUNE, "--adap_eval", "adap_eval: has no effect without --eval"),
    (FINETUNE, "--mi_xz 1", "mi_xz: has no effect without --mi_loss dib_mi"),
    (FINETUNE, "--layer_decay 0", "layer_decay: 0: all layers but the last keep their values"),
    (EVALUATE, "--checkpoint x --held_out 9", "held_out: has no effect without --split held_out"),
    (
        EVALUATE,
        "--checkpoint x --attacks clean,fgsm --restarts 3",
        "restarts: has no effect without an attack of several steps",
    ),
    (EVALUATE, "--checkpoint x --mi_weight 3", "mi_weight: has no effect without pgd-mi"),
    (EVALUATE, "--checkpoint x --aa_batch 3", "aa_batch: has no effect without aa"),
    (ANALYZE, "--checkpoint x --held_out 9", "held_out: has no effect without --split held_out"),
]


@pytest.mark.parametrize(("command", "line", "said"), IDLE)
def test_what_cannot_do_as_it_says_has_a_line(command, line, said):
    assert any(note.startswith(said) for note in notes(command, line)), notes(command, line)


@pytest.mark.parametrize(
    ("command", "line"),
    [
        (PRETRAIN, ""),
        (FINETUNE, ""),
        (PRETRAIN, "--attack pgd_mae --mi_train hsic --mi_xpl 1e-5 --attack_mask_ratio 0.5"),
        (FINETUNE, "--attack_train pgd --alpha 0 --alpha_schedule linear --alpha_end 2"),
        (FINETUNE, "--attack_train apgd --steps 2 --eps_warmup_epochs 5 --model_ema --model_ema_decay 0.9"),
        (
            FINETUNE,
            "--attack_train trades --trades_beta 2 --mixup 0.8 --mixup_mode elem --val_attack fgsm --val_every 3",
        ),
        (FINETUNE, "--steps 0 --alpha 0"),
        (
            EVALUATE,
            "--checkpoint x --attacks aa,pgd-mi --mi_weight 3 --aa_batch 8 --alpha 2 --held_out 9 --split held_out",
        ),
        *[(PRETRAIN, f"--recipe {name}") for name in PRETRAIN.recipes],
        *[(FINETUNE, f"--recipe {name}") for name in FINETUNE.recipes],
        *[(EVALUATE, f"--recipe {name} --checkpoint x") for name in EVALUATE.recipes],
    ],
)
def test_what_does_has_none(command, line):
    line += " --aux_data_filename x.npz" if "cifar10_vit_s" in line else ""
    assert not [note for note in notes(command, line) if not note.startswith("alpha: apgd chooses")]


def test_schedules_that_fall_short_are_said_with_the_peak_that_is_reached():
    assert schedule_notes(OptimConfig(epochs=100), 10, 1e-3) == []
    (line,) = schedule_notes(OptimConfig(epochs=2, warmup_epochs=40), 10, 1e-3)
    assert line == "warmup_epochs: 40 of 2 epochs: the learning rate rises to 4.75e-05, not to 0.001"
    (line,) = schedule_notes(OptimConfig(epochs=100, accum_iter=3), 10, 1e-3)
    assert line == "accum_iter: the last 1 of an epoch's 10 micro-batches make no update and are dropped"
    (line,) = schedule_notes(OptimConfig(epochs=100, min_lr=1.0), 10, 1e-3)
    assert line.startswith("min_lr: 1 is above the peak 0.001")
    lines = schedule_notes(OptimConfig(epochs=1, warmup_epochs=1, accum_iter=4), 10, 1e-3)
    assert lines[1] == "warmup_epochs: 1 of 1 epochs: the learning rate rises to 0.0004, not to 0.001"


# ---- errors


def bad_value(field) -> str | None:
    kind = field.metadata["type"]
    return "some'thing" if kind in (int, float) or field.metadata["choices"] else None


CASES = [(name, f) for name, command in COMMANDS.items() for f in command.config.flags().values() if bad_value(f)]


@pytest.mark.parametrize(("verb", "field"), CASES, ids=[f"{verb}-{field.name}" for verb, field in CASES])
def test_every_flags_error_names_flag_value_and_what_is_allowed(verb, field, capsys):
    if field.metadata["compat"]:
        pytest.skip("takes any word under --compat original")
    with pytest.raises((SystemExit, ValueError)) as error:
        parse_args(COMMANDS[verb], [f"--{field.name}", "some'thing"])
    text = str(error.value) if isinstance(error.value, ValueError) else capsys.readouterr().err.splitlines()[-1]
    assert field.name in text
    assert "some'thing" in text
    assert any(word in text for word in ("int", "float", *field.metadata["choices"]))


def test_a_flag_that_does_not_exist_names_the_one_that_was_meant(capsys):
    with pytest.raises(SystemExit):
        parse_args(PRETRAIN, ["--epocs", "3"])
    assert capsys.readouterr().err.endswith("unrecognized arguments: --epocs 3; did you mean --epochs?\n")


@pytest.mark.parametrize("value", ["nan", "inf"])
@pytest.mark.parametrize("config", [PretrainConfig, FinetuneConfig, EvaluateConfig])
def test_no_flag_takes_what_is_no_number(config, value):
    floats = [f.name for kind in config.sections().values() for f in fields(kind) if f.metadata["type"] is float]
    assert len(floats) > 2
    for name in floats:
        number = (0.1, float(value)) if config.flags()[name].metadata["several"] else float(value)
        base = {"checkpoint": "x"} if config is EvaluateConfig else {}
        with pytest.raises(ValueError, match=f"^{name}: got .*{value}"):
            config().updated({**base, name: number}).check()


@pytest.mark.parametrize(
    ("name", "pretraining", "meant"),
    [
        ("mae_vit_base_patch16_dec512d8b", True, "mae_vit_base"),
        ("mae_vit_large_patch14", True, "mae_vit_large"),
        ("vit_tiny_patch16_224", False, "vit_ti"),
        ("deit_small_patch16_224", False, "vit_small"),
        ("vit_base_patch16_224.augreg_in21k", False, "vit_base"),
        ("ViT-B", False, "vit_base"),
        ("mae_vit_small", False, "vit_small"),
        ("vit_smal", False, "vit_small"),
        ("resnet50", False, None),
        ("vit_huge_patch14", False, None),
    ],
)
def test_other_programs_names_of_models_are_understood(name, pretraining, meant):
    with pytest.raises(ValueError, match=f"^model: unknown name '{name}'; choose one of ") as error:
        find(name, pretraining)
    assert str(error.value).endswith(f"did you mean {meant}?") == (meant is not None)


# ---- home


def path_flags() -> list[tuple[str, str]]:
    return [(verb, f.name) for verb, c in COMMANDS.items() for f in c.config.flags().values() if f.metadata["path"]]


def test_the_flags_that_are_paths():
    """A new flag of a file or folder belongs to this list."""
    train = {"data_root", "stage", "aux_data_filename", "output_dir", "log_dir", "resume"}
    named = {verb: {name for v, name in path_flags() if v == verb} for verb in COMMANDS}
    assert named == {
        "pretrain": train,
        "finetune": {*train, "finetune", "val_list"},
        "evaluate": {"checkpoint", "data_root", "image_list", "output_dir"},
        "analyze": {"checkpoint", "data_root", "output_dir"},
        "export": {"checkpoint", "output"},
    }


@pytest.mark.parametrize(("verb", "name"), path_flags())
def test_the_home_folder_in_every_path(tmp_path, monkeypatch, verb, name):
    """On the command line, in a file of flags and from Python; nothing else in a path is touched."""
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "c.yaml").write_text(f"{name}: ~/a/b.safetensors\n")
    command, expected = COMMANDS[verb], f"{tmp_path}/a/b.safetensors"
    (tmp_path / "a").mkdir()
    required = {"evaluate": ("checkpoint",), "analyze": ("checkpoint",), "export": ("checkpoint", "output")}.get(
        verb, ()
    )
    needed = [word for other in required if other != name for word in (f"--{other}", "x.safetensors")]
    for words in ([f"--{name}", "~/a/b.safetensors"], [f"--{name}=~/a/b.safetensors"], ["--config", "~/c.yaml"]):
        config, _ = parse_args(command, [*needed, *words])
        value = config.flat()[name]
        assert value == ((expected,) if command.config.flags()[name].metadata["several"] else expected)
    several = command.config.flags()[name].metadata["several"]
    given = "~/x~/y" if not several else ("~/x~/y", "https://example.org/~me/x.pth")
    kept = command.config().updated({name: given}).flat()[name]
    assert kept == (f"{tmp_path}/x~/y" if not several else (f"{tmp_path}/x~/y", given[1]))


def test_homes_that_do_not_exist_are_named(monkeypatch):
    with pytest.raises(
        ValueError, match=r"^output_dir: got '~nobody-of-that-name/x', expected a path of a home folder"
    ):
        PretrainConfig().updated({"output_dir": "~nobody-of-that-name/x"})
    assert home_path("a/~/b") == "a/~/b"
    monkeypatch.setenv("HOME", "/h")
    assert demo_parser().parse_args(["--output_dir", "~/demo"]) == argparse.Namespace(
        output_dir="/h/demo", seed=0, model="vit_nano", input_size=32, aa_images=8
    )


def test_notes_reach_the_run():
    run = resolve(*parse_args(FINETUNE, ["--device", "cpu", "--attack_train", "pgd", "--steps", "0"]), CPU)
    assert any(note.startswith("steps: 0") for note in run.notes)
    assert math.isfinite(run.config.attack.eps)
