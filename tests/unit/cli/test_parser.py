"""The command line: every flag of the original, both spellings, abbreviations, layers, and clear errors."""

from dataclasses import dataclass

import pytest

from mimir_fast.cli.parser import Command, build_parser, parse_args
from mimir_fast.cli.pretrain import PRETRAIN, main
from mimir_fast.config.fields import Configuration, flag
from mimir_fast.config.pretraining import PretrainConfig
from mimir_fast.config.pretraining_recipes import RECIPES

# flag: (type, default), as in the original's parser
ORIGINAL = {
    "batch_size": (int, 64),
    "epochs": (int, 100),
    "accum_iter": (int, 1),
    "model": (str, "mae_vit_ti_patch16"),
    "input_size": (int, 224),
    "patch_size": (int, 16),
    "mask_ratio": (float, 0.75),
    "norm_pix_loss": (bool, False),
    "weight_decay": (float, 0.05),
    "lr": (float, None),
    "blr": (float, 1e-3),
    "min_lr": (float, 0.0),
    "warmup_epochs": (int, 40),
    "dataset": (str, "imagenet"),
    "data_root": (str, "../data"),
    "use_edm": (bool, False),
    "unsup_fraction": (float, 0.7),
    "aux_data_filename": (str, ""),  # the original's is a file of its authors' machine
    "edm_aug": (str, "base"),
    "use_normalize": (bool, False),
    "output_dir": (str, "./experiment"),
    "log_dir": (str, "./experiment"),
    "device": (str, "cuda"),
    "seed": (int, 0),
    "resume": (str, ""),
    "start_epoch": (int, 0),
    "num_workers": (int, 32),
    "pin_mem": (bool, True),
    "attack": (str, "plain"),
    "steps": (int, 1),
    "eps": (float, 8),
    "alpha": (float, 10),
    "mi_xl": (float, 0.0),
    "mi_xpl": (float, 1e-5),
    "mi_train": (str, "plain"),
    "world_size": (int, 1),
    "local_rank": (int, -1),
    "dist_on_itp": (bool, False),
    "dist_url": (str, "env://"),
}
CHECKED = {
    "model": ("mae_vit_base", "mae_vit_base"),
    "device": ("cpu", "cpu"),
    "patch_size": ("8", 8),
    "input_size": ("32", 32),
    "dataset": ("svhn", "svhn"),
    "edm_aug": ("idbh", "idbh"),
    "attack": ("pgd_mae", "pgd_mae"),
    "mi_train": ("hsic", "hsic"),
}
SAMPLES = {int: ("3", 3), float: ("0.5", 0.5), str: ("word", "word")}


def parse(line: str) -> PretrainConfig:
    return parse_args(PRETRAIN, line.split())[0]


@pytest.mark.parametrize(("name", "kind", "default"), [(n, *v) for n, v in ORIGINAL.items()])
def test_original_flag(name, kind, default):
    assert PretrainConfig().flat()[name] == default
    parser = build_parser(PRETRAIN)
    for spelling in (name, name.replace("_", "-")):
        if kind is bool:
            config, explicit = parse_args(PRETRAIN, [f"--{spelling}"])
            assert config.flat()[name] is True
        else:
            word, value = SAMPLES[kind]
            word, value = CHECKED.get(name, (word, value))
            config, explicit = parse_args(PRETRAIN, [f"--{spelling}={word}"])
            assert config.flat()[name] == value
            assert type(config.flat()[name]) is kind
        assert explicit == {name}
    assert f"--{name}" in parser.format_help()


def test_every_flag_explains_itself():
    text = build_parser(PRETRAIN).format_help()
    for action in build_parser(PRETRAIN)._actions:
        assert action.help, action.dest
    assert "1/255" in text
    assert "[epochs]" in text


def test_abbreviations_negatives_and_new_flags():
    assert parse("--warmup 3 --norm_pix --aux file.npz").optim.warmup_epochs == 3
    assert parse("--log somewhere").run.log_dir == "somewhere"  # log_every is new: it does not make --log ambiguous
    assert parse("--no_pin_mem").data.pin_mem is False
    assert parse("--no-pin-mem").data.pin_mem is False
    config = parse("--precision fp16 --no-compile --attack_mask_ratio 0.5 --max_bad_steps 3")
    assert (config.compute.precision, config.compute.compile) == ("fp16", False)
    assert (config.attack.attack_mask_ratio, config.optim.max_bad_steps) == (0.5, 3)
    assert parse("--compile").compute.compile is True
    assert parse("").compute.compile is None


def test_layers_defaults_recipe_file_flags(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("eps: 4\nlr: 1e-3\nbatch_size: 16\n")
    config, explicit = parse_args(PRETRAIN, ["--recipe", "cifar10_vit_s", "--config", str(file), "--batch_size", "8"])
    assert (config.model.model, config.attack.eps, config.optim.lr, config.optim.batch_size) == (
        "mae_vit_small",
        4.0,
        1e-3,
        8,
    )
    assert {"model", "eps", "lr", "batch_size"} <= explicit
    assert "min_lr" not in explicit


# Published models whose settings are not: those of the ViT-S on the same images.
FAMILIES = {
    "cifar10_convit_ti": "convit_ti",
    "cifar10_convit_s": "convit_small",
    "cifar10_convit_b": "convit_base",
    "imagenet_cait_xxs24": "cait_xxs24",
    "imagenet_cait_s36": "cait_s36",
}


def test_published_recipes():
    shared = {
        "model": "mae_vit_small",
        "epochs": 800,
        "warmup_epochs": 40,
        "blr": 1.5e-4,
        "weight_decay": 0.05,
        "mask_ratio": 0.75,
        "norm_pix_loss": True,
        "steps": 1,
        "eps": 8,
        "alpha": 10,
        "mi_train": "hsic",
        "mi_xpl": 1e-5,
        "use_normalize": False,
        "accum_iter": 1,
    }
    cifar = {
        "dataset": "cifar10",
        "input_size": 32,
        "patch_size": 2,
        "batch_size": 128,
        "num_workers": 0,
        "use_edm": True,
    }
    cifar |= {"unsup_fraction": 0.7, "edm_aug": "base"}
    imagenet = {"dataset": "imagenet", "input_size": 224, "patch_size": 16, "batch_size": 512, "num_workers": 10}
    for name, own in {"cifar10_vit_s": cifar, "imagenet_vit_s": imagenet | {"use_edm": False}}.items():
        flat = RECIPES[name]().flat()
        for word, value in (shared | own).items():
            assert flat[word] == value, (name, word)
        assert flat["attack"] != "plain"
    assert RECIPES["imagenet_vit_b"]().model.model == "mae_vit_base"
    for name, model in FAMILIES.items():
        like = name.split("_")[0] + "_vit_s"
        assert RECIPES[name]().flat() == RECIPES[like]().flat() | {"model": f"mae_{model}"}
    swin = {"model": "mae_swin_large", "batch_size": 1024, "blr": 1e-4}
    assert RECIPES["imagenet_swin_l"]().flat() == RECIPES["imagenet_vit_s"]().flat() | swin
    assert RECIPES["imagenet_swin_b"]().flat() == RECIPES["imagenet_swin_l"]().flat() | {"model": "mae_swin_base"}
    for recipe in RECIPES.values():
        recipe().check()


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("--batch_size 0", ["batch_size", "1 or more"]),
        ("--mask_ratio 1.0", ["mask_ratio", "1.0"]),
        ("--attack_mask_ratio 1.5", ["attack_mask_ratio"]),
        ("--input_size 32 --patch_size 5", ["patch_size", "divisor"]),
        ("--eps 0.031", ["eps", "1/255"]),
        ("--device tpu", ["device", "cuda or cpu"]),
        ("--input_size 32 --mask_ratio 0.9 --attack_mask_ratio 0.9", ["mask_ratio", "4 patches"]),
        ("--seed -1", ["seed", "0 or more"]),
    ],
)
def test_impossible_values_name_the_flag(line, words):
    with pytest.raises(ValueError, match=words[0]) as error:
        parse(line)
    assert all(word in str(error.value) for word in words)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("batchsize: 3", ["batchsize", "did you mean batch_size"]),
        ("batch_size: many", ["batch_size", "int"]),
        ("norm_pix_loss: 1", ["norm_pix_loss", "bool"]),
        ("compile_mode: off", ["compile_mode", "max-autotune"]),
        ("- a list", ["flag: value"]),
        ("a: [", ["cannot read"]),
    ],
)
def test_config_file_errors(tmp_path, text, words):
    file = tmp_path / "run.yaml"
    file.write_text(text)
    with pytest.raises(ValueError, match="config") as error:
        parse(f"--config {file}")
    assert all(word in str(error.value) for word in words)


def test_unknown_flag_and_missing_file(capsys):
    with pytest.raises(SystemExit) as stop:
        parse("--learning_rate 3")
    assert stop.value.code == 2
    assert "learning_rate" in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"nowhere\.yaml"):
        parse("--config nowhere.yaml")


def test_the_published_cifar_recipe_asks_for_its_file(capsys):
    assert main(["--recipe", "cifar10_vit_s", "--device", "cpu", "--output_dir", "", "--log_dir", ""]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("mimir-fast pretrain: error: aux_data_filename: got none, --use_edm needs an .npz file")


def test_help_without_docstrings_has_the_sections_names(monkeypatch):
    """As under python -OO; planted: a section's title is its dataclass's signature."""

    @dataclass(frozen=True)
    class Data:
        root: str = flag("x", "a folder")

    @dataclass(frozen=True)
    class Bare(Configuration):
        data: Data = Data()

    monkeypatch.setattr(Bare, "sections", classmethod(lambda cls: {"data": Data}))

    def tiny() -> Bare:
        return Bare()

    text = build_parser(Command("x", "what it does", Bare, {"tiny": tiny})).format_help()
    assert "\ndata:\n  --root" in text
    assert "start from a named run. tiny\n" in text
