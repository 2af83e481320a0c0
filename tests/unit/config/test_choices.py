"""Words: those of the original's scripts, those that are none, and what --compat original makes of them."""

from dataclasses import replace

import pytest

from mimir_fast.cli import analyze, evaluate, export
from mimir_fast.cli.finetune import FINETUNE
from mimir_fast.cli.parser import Command, build_parser, parse_args
from mimir_fast.cli.pretrain import PRETRAIN
from mimir_fast.config.analysis import AnalyzeConfig
from mimir_fast.config.choices import PENALTIES, PRECISIONS, RESIDUAL_DTYPES
from mimir_fast.config.evaluation import EvaluateConfig
from mimir_fast.config.export import ExportConfig
from mimir_fast.config.finetuning import FinetuneConfig
from mimir_fast.config.pretraining import PretrainConfig
from mimir_fast.config.resolve import DTYPES
from mimir_fast.training.pretraining import penalty_name

CONFIGURATIONS = (PretrainConfig, FinetuneConfig, EvaluateConfig, AnalyzeConfig, ExportConfig)


def parse(command: Command, line: str):
    return parse_args(command, line.split())[0]


def misspelt() -> PretrainConfig:
    """A recipe with a word that is none."""
    return PretrainConfig().updated({"attack": "plian"})


@pytest.mark.parametrize(
    ("command", "line"),
    [
        (PRETRAIN, "--attack pgd_mae --mi_train hsic --dataset cifar10 --use_edm --aux_data_filename 5m.npz"),
        (PRETRAIN, "--attack pgd_mae --mi_train hsic --dataset imagenet"),
        (FINETUNE, "--attack_train pgd --dataset cifar10 --aa noaug --use_edm --aux_data_filename 5m.npz"),
        (FINETUNE, "--attack_train pgd --dataset imagenet --aa noaug"),
        (FINETUNE, "--eval --resume checkpoint-99.pth --dataset cifar10 --adap_eval"),
    ],
)
def test_the_originals_scripts_use_words_that_are_known(command, line):
    assert parse(command, line).run.compat == "none"


@pytest.mark.parametrize(
    ("command", "line", "message"),
    [
        (PRETRAIN, "--attack plian", "attack: got 'plian', expected plain or pgd_mae; did you mean plain?"),
        (PRETRAIN, "--attack pgd", "did you mean pgd_mae? (--compat original: any other word switches the attack on)"),
        (
            PRETRAIN,
            "--mi_train hscic",
            "mi_train: got 'hscic', expected one of plain, hsic, dib_mi, renyi2; did you mean",
        ),
        (
            PRETRAIN,
            "--model mae_vit_smal",
            "model: unknown name 'mae_vit_smal'; choose one of mae_vit_nano, mae_vit_ti",
        ),
        (FINETUNE, "--model mae_vit_small", "model: unknown name 'mae_vit_small'; choose one of vit_nano, vit_ti"),
        (PRETRAIN, "--precision bf61", "precision: got 'bf61', expected one of bf16, fp16, fp32; did you mean bf16?"),
        (PRETRAIN, "--dataset cifar", "did you mean cifar10?"),
        (PRETRAIN, "--dataset MNIST --compat original", "dataset: got 'MNIST', expected one of imagenet, "),
        (PRETRAIN, "--compat orginal", "compat: got 'orginal', expected none or original; did you mean original?"),
        (FINETUNE, "--mi_loss hsic", "mi_loss: got 'hsic', expected plain or dib_mi (--compat original: any other"),
        (FINETUNE, "--attack_train pdg --compat original", "attack_train: got 'pdg', expected one of plain, pgd, "),
        (
            FINETUNE,
            "--mixup_mode pairs",
            "mixup_mode: got 'pairs', expected one of batch, pair, elem; did you mean pair?",
        ),
        (FINETUNE, "--remode pixels", "remode: got 'pixels'"),
        (FINETUNE, "--alpha_schedule cosin", "alpha_schedule: got 'cosin'"),
        (FINETUNE, "--edm_aug heavy", "edm_aug: got 'heavy'"),
    ],
)
def test_an_unknown_word_names_flag_value_and_what_is_allowed(command, line, message):
    with pytest.raises(ValueError, match=line.split()[0][2:]) as error:
        parse(command, line)
    assert message in str(error.value)


@pytest.mark.parametrize(("verb", "more"), [(analyze, []), (export, ["--output", "x.safetensors"]), (evaluate, [])])
def test_a_model_that_does_not_exist_is_named_before_a_file_is_read(verb, more, capsys):
    assert verb.main(["--checkpoint", "absent.pth", "--model", "vit_smal", *more]) == 2
    assert "model: unknown name 'vit_smal'; choose one of " in capsys.readouterr().err


def test_files_and_recipes_go_through_the_same_check(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("mi_train: hscic\n")
    with pytest.raises(ValueError, match="mi_train: got 'hscic'"):
        parse(PRETRAIN, f"--config {file}")
    assert parse(PRETRAIN, f"--config {file} --compat original").penalty.mi_train == "hscic"
    with pytest.raises(ValueError, match="attack: got 'plian'"):
        parse(replace(PRETRAIN, recipes={"misspelt": misspelt}), "--recipe misspelt")


def test_the_original_reads_any_word():
    config = parse(PRETRAIN, "--attack plian --mi_train hscic --edm_aug heavy --compat original")
    assert config.attack.attack != "plain"
    assert penalty_name(config) is None
    (note,) = config.notes(set())
    assert f"'hscic' is none of {', '.join(PENALTIES)}: NO penalty, as in the original" in note
    (note,) = parse(FINETUNE, "--mi_loss hsic --compat original").notes(set())
    assert "'hsic' is not dib_mi: NO information term, as in the original" in note
    assert parse(PRETRAIN, "--attack pgd_mae --mi_train hsic").notes(set()) == []


@pytest.mark.parametrize("config", CONFIGURATIONS)
def test_every_default_is_possible_and_words_stand_in_the_help(config):
    text = " ".join(build_parser(Command("x", "", config, {})).format_help().split())
    for name, field in config.flags().items():
        choices = field.metadata["choices"]
        if choices:
            assert field.default is None or field.default in choices, name
            assert f"--{name} {{{','.join(choices)}}}" in text, name


def test_every_precision_is_a_dtype():
    assert set(DTYPES) == {*PRECISIONS, *RESIDUAL_DTYPES}
