"""The command line of fine-tuning: every flag of the original, what data sets decide, recipes, and clear errors."""

import pytest

from mimir_fast.cli import finetune as command
from mimir_fast.cli.finetune import FINETUNE
from mimir_fast.cli.parser import build_parser, parse_args
from mimir_fast.config.finetuning import FinetuneConfig, validation_steps
from mimir_fast.config.finetuning_recipes import RECIPES
from mimir_fast.training.attack_schedule import build_mixing, radius_and_step
from mimir_fast.training.optimizer import peak_learning_rate

# flag: (type, default), as in the original's parser
ORIGINAL = {
    "batch_size": (int, 64),
    "epochs": (int, 50),
    "accum_iter": (int, 1),
    "model": (str, "vit_large_patch16"),
    "input_size": (int, 224),
    "patch_size": (int, 16),
    "drop_path": (float, 0.1),
    "clip_grad": (float, None),
    "weight_decay": (float, 0.05),
    "lr": (float, None),
    "blr": (float, 1e-3),
    "layer_decay": (float, 0.75),
    "min_lr": (float, 1e-6),
    "warmup_epochs": (int, 5),
    "warmup_aa": (bool, False),
    "color_jitter": (float, None),
    "aa": (str, "rand-m9-mstd0.5-inc1"),
    "smoothing": (float, 0.1),
    "reprob": (float, 0.25),
    "remode": (str, "pixel"),
    "recount": (int, 1),
    "resplit": (bool, False),
    "mixup": (float, 0.0),
    "cutmix": (float, 0.0),
    "cutmix_minmax": (float, None),
    "mixup_prob": (float, 1.0),
    "mixup_switch_prob": (float, 0.5),
    "mixup_mode": (str, "batch"),
    "finetune": (str, ""),
    "global_pool": (bool, True),
    "nb_classes": (int, 1000),
    "dataset": (str, "imagenet"),
    "data_root": (str, "../data"),
    "use_edm": (bool, False),
    "unsup_fraction": (float, 0.7),
    "aux_data_filename": (str, ""),
    "edm_aug": (str, "base"),
    "use_normalize": (bool, False),
    "output_dir": (str, "./output_dir"),
    "log_dir": (str, "./output_dir"),
    "device": (str, "cuda"),
    "seed": (int, 0),
    "resume": (str, ""),
    "start_epoch": (int, 0),
    "eval": (bool, False),
    "dist_eval": (bool, False),
    "num_workers": (int, 32),
    "pin_mem": (bool, True),
    "attack_train": (str, "plain"),
    "attack": (str, "pgd"),
    "steps": (int, 10),
    "eps": (float, 8),
    "alpha": (float, 2),
    "trades_beta": (float, 6.0),
    "mi_xz": (float, 1e-4),
    "mi_yz": (float, 1e-3),
    "mi_loss": (str, "plain"),
    "adap_eval": (bool, False),
    "world_size": (int, 1),
    "local_rank": (int, -1),
    "dist_on_itp": (bool, False),
    "dist_url": (str, "env://"),
}
SAMPLES = {
    "model": "vit_base",
    "device": "cpu",
    "patch_size": "8",
    "input_size": "32",
    "drop_path": "0.5",
    "attack_train": "trades",
    "edm_aug": "idbh",
    "remode": "const",
    "mixup_mode": "elem",
    "mi_loss": "dib_mi",
    "dataset": "svhn",
}
USUAL = {int: "3", float: "0.5", str: "word"}


def parse(line: str) -> FinetuneConfig:
    return parse_args(FINETUNE, line.split())[0]


@pytest.mark.parametrize(("name", "kind", "default"), [(n, *v) for n, v in ORIGINAL.items()])
def test_original_flag(name, kind, default):
    assert FinetuneConfig().flat()[name] == default
    words = "--resume x.pth" if name == "eval" else ""
    for spelling in (name, name.replace("_", "-")):
        if kind is bool:
            config, explicit = parse_args(FINETUNE, [f"--{spelling}", *words.split()])
            assert config.flat()[name] is True
        else:
            word = SAMPLES.get(name, USUAL[kind])
            several = ["0.7"] if name == "cutmix_minmax" else []
            config, explicit = parse_args(FINETUNE, [f"--{spelling}", word, *several])
            assert config.flat()[name] == ((0.5, 0.7) if several else kind(word))
        assert name in explicit


def test_abbreviations_negatives_and_inert_flags():
    assert parse("--cls_token").model.global_pool is parse("--cls-token").model.global_pool is False
    assert parse("--cls").model.global_pool is False
    assert parse("--warmup_e 3 --layer 0.5").optim.layer_decay == 0.5
    assert parse("--no-pin-mem").data.pin_mem is False
    text = build_parser(FINETUNE).format_help()
    assert text.count("the original never reads it") == 2  # --attack, --resplit
    for action in build_parser(FINETUNE)._actions:
        assert action.help, action.dest
    for name in ("model_ema", "val_attack", "held_out", "val_every", "alpha_schedule", "compile"):
        assert f"--{name}" in text


@pytest.mark.parametrize(
    ("line", "side", "classes"),
    [
        ("--dataset cifar10 --patch_size 2", 32, 10),
        ("--dataset tiny-imagenet", 64, 200),
        ("", 224, 1000),
        ("--dataset cifar100 --input_size 40 --patch_size 4", 40, 100),  # the original would train at 32
        ("--dataset imagenet --input_size 192 --nb_classes 100", 192, 100),
        ("--dataset imagefolder", 224, None),
        ("--dataset imagefolder --nb_classes 7", 224, 7),
    ],
)
def test_the_data_set_decides_what_was_not_given(line, side, classes):
    config = parse(line)
    assert (config.model.input_size, config.model.nb_classes) == (side, classes)


# Published models whose settings are not: those of the ViT-S on the same images.
FAMILIES = {
    "cifar10_convit_ti": "convit_ti",
    "cifar10_convit_s": "convit_small",
    "cifar10_convit_b": "convit_base",
    "imagenet_cait_xxs24": "cait_xxs24",
    "imagenet_cait_s36": "cait_s36",
}


def test_published_recipes():
    shared = {"model": "vit_small", "attack_train": "pgd", "weight_decay": 0.05, "layer_decay": 0.65, "drop_path": 0.1}
    shared |= {"aa": "noaug", "reprob": 0, "smoothing": 0.1, "mixup": 0, "use_normalize": False, "clip_grad": None}
    imagenet = {"batch_size": 256, "epochs": 100, "warmup_epochs": 10, "blr": 1e-3, "steps": 1, "eps": 4, "alpha": 5}
    cifar = {"batch_size": 32, "epochs": 50, "warmup_epochs": 5, "blr": 0.05, "steps": 10, "eps": 8, "alpha": 2}
    cifar |= {"input_size": 32, "patch_size": 2, "use_edm": True, "unsup_fraction": 0.7, "edm_aug": "base"}
    for name, own in {"imagenet_vit_s": imagenet | {"use_edm": False}, "cifar10_vit_s": cifar}.items():
        flat = parse(f"--recipe {name}").flat()
        for flag, value in (shared | own).items():
            assert flat[flag] == value, (name, flag)
    long = parse("--recipe imagenet_vit_b_apgd").flat()
    expected = {"model": "vit_base", "attack_train": "apgd", "steps": 2, "eps": 4, "epochs": 300, "model_ema": True}
    expected |= {"mixup": 0.8, "cutmix": 1.0, "model_ema_decay": 0.9998}
    assert {name: long[name] for name in expected} == expected
    ares = {"steps": 3, "eps": 4, "alpha": 8 / 3, "alpha_warmup_epochs": 5, "layer_decay": 1, "warmup_epochs": 5}
    ares |= {"lr_at_start": 1e-6, "cosine_from": "start", "reprob": 0.25, "smoothing": 0.1, "val_attack": "pgd10"}
    ares |= {"attack_train": "pgd_best", "mixup": 0.8, "cutmix": 1.0, "model_ema_decay": 0.9998, "drop_path": 0}
    sizes = {
        "imagenet_swin_b_ares": ("swin_base", 128, 200, 1e-5),
        "imagenet_swin_l_ares": ("swin_large", 64, 100, 1e-6),
    }
    for name, own in sizes.items():
        config = parse(f"--recipe {name}")
        expected = ares | dict(zip(("model", "batch_size", "epochs", "min_lr"), own))
        assert {flag: config.flat()[flag] for flag in expected} == expected
        # The peak: 5e-4 per 512 images.
        assert peak_learning_rate(config.optim, 8) == pytest.approx(5e-4 * own[1] * 8 / 512)
    for name, model in FAMILIES.items():
        like = name.split("_")[0] + "_vit_s"
        assert RECIPES[name]().flat() == RECIPES[like]().flat() | {"model": model}
    text = build_parser(FINETUNE).format_help().replace("\n", " ")
    for name, recipe in RECIPES.items():
        recipe().check()
        assert name in text


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("--attack_train fgsm", ["attack_train", "plain, pgd, trades, mart, apgd, pgd_best"]),
        ("--eps 0.031", ["eps", "1/255"]),
        ("--alpha 0.0078", ["alpha", "1/255"]),
        ("--attack_train mart --mixup 0.8", ["attack_train", "mart", "--mixup"]),
        ("--attack_train mart --cutmix_minmax 0.2 0.5", ["attack_train", "mart"]),
        ("--attack_train mart --warmup_aa", ["attack_train", "mart"]),
        ("--cutmix_minmax 0.5", ["cutmix_minmax", "two"]),
        ("--dataset cifar10 --patch_size 5", ["patch_size", "divisor"]),
        ("--val_attack cw", ["val_attack", "pgd10"]),
        ("--val_attack pgd0", ["val_attack"]),
        ("--val_every 0", ["val_every", "1 or more"]),
        ("--drop_path 1.5", ["drop_path", "0 and 1"]),
        ("--nb_classes 0", ["nb_classes"]),
        ("--clip_grad 0", ["clip_grad"]),
        ("--edm_aug heavy", ["edm_aug", "idbh"]),
        ("--mixup 0.8 --mixup_mode pair --batch_size 5", ["batch_size", "5", "even"]),
        ("--eval", ["resume", "--eval"]),
    ],
)
def test_impossible_values_name_the_flag(line, words):
    with pytest.raises(ValueError, match=words[0]) as error:
        parse(line)
    assert all(word in str(error.value) for word in words)


def test_file_of_flags_and_validation_attacks(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("cutmix_minmax: [0.2, 0.8]\nattack_train: apgd\nclip_grad: 1\n")
    config = parse(f"--config {file}")
    assert (config.augment.cutmix_minmax, config.attack.attack_train, config.optim.clip_grad) == (
        (0.2, 0.8),
        "apgd",
        1.0,
    )
    assert [validation_steps(word) for word in ("none", "fgsm", "pgd10", "pgd-20")] == [None, 0, 10, 20]


def test_the_attack_that_is_not_read_is_told():
    (note,) = parse("--attack trades").notes({"attack"})
    assert note == "attack: fine-tuning does not read it; its attack is --attack_train plain"
    assert parse("--attack pgd --attack_train pgd").notes({"attack", "attack_train"}) == []
    assert parse("").notes(set()) == []


def test_radius_and_step_of_an_epoch():
    ares = parse("--eps 4 --alpha 2.5 --alpha_warmup_epochs 5").attack
    assert [radius_and_step(ares, e, 300) for e in (0, 1, 5, 299)] == [(4, 0), (4, 0.5), (4, 2.5), (4, 2.5)]
    grown = parse("--eps 8 --eps_warmup_epochs 4").attack
    assert [radius_and_step(grown, e, 10)[0] for e in (0, 1, 4, 9)] == [0, 2, 8, 8]
    line = parse("--alpha 10 --alpha_schedule linear --alpha_end 2").attack
    assert [radius_and_step(line, e, 5)[1] for e in range(5)] == [10, 8, 6, 4, 2]
    cosine = parse("--alpha 10 --alpha_schedule cosine --alpha_warmup_epochs 1").attack
    assert [radius_and_step(cosine, e, 6)[1] for e in (0, 1, 3, 5)] == [0, 10, 5, pytest.approx(0)]


def test_mixing_of_an_epoch():
    assert build_mixing(parse(""), 0) is None
    mixing = build_mixing(parse("--mixup 0.8 --smoothing 0.2 --dataset cifar10"), 0)
    assert (mixing.mixup, mixing.cutmix, mixing.smoothing, mixing.num_classes) == (0.8, 0, 0.2, 10)
    warmed = parse("--warmup_aa --attack_train pgd")
    assert build_mixing(warmed, 5) is None
    assert (build_mixing(warmed, 6).mixup, build_mixing(warmed, 6).cutmix) == (0.8, 1.0)
    assert build_mixing(parse("--warmup_aa"), 6) is None  # no attack


def test_ctrl_c_outside_of_the_loop_is_one_line(monkeypatch, capsys):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "evaluate", interrupted)
    assert command.main(["--eval", "--resume", "x.pth", "--device", "cpu"]) == 130
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "the same command goes on" in line
