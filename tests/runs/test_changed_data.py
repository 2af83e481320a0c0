"""Data that changed between a run and what goes on from it: renamed classes, images more or fewer, one class alone."""

import shutil

import pytest
from PIL import Image

from mimir_fast.cli.analyze import main as analyze
from mimir_fast.cli.evaluate import main as evaluate
from mimir_fast.cli.export import main as export
from mimir_fast.data.splits import check_same_classes
from tests.support.finetune_runs import finetune, load, make_data, small_models


@pytest.fixture(autouse=True, scope="module")
def _tiny():
    with pytest.MonkeyPatch.context() as patch:
        small_models(patch.setitem)
        yield


@pytest.fixture
def data(tmp_path):
    return make_data(tmp_path / "images")


@pytest.fixture
def stopped(data, tmp_path):
    """A run that was stopped in the middle of its second epoch."""
    assert finetune(data, tmp_path / "run", "--max_steps 8 --test_every 0") == 0
    return tmp_path / "run"


def rename(data, before: str, after: str) -> None:
    for split in ("train", "val"):
        (data / split / before).rename(data / split / after)


def test_other_classes_of_the_same_number_are_an_error_everywhere(data, stopped, tmp_path, capsys):
    """At resume and in evaluate, analyze, --eval, of a checkpoint and of what was exported from it."""
    point = stopped / "resume-1-2.pth"
    assert load(point)["mimir_fast"]["classes"] == ["class0", "class1"]
    exported = tmp_path / "exported.safetensors"
    assert export(["--checkpoint", str(point), "--output", str(exported)]) == 0
    rename(data, "class0", "zebra")
    common = ["--data_root", str(data), "--device", "cpu"]
    capsys.readouterr()
    assert finetune(data, stopped, "--resume auto") == 2
    message = capsys.readouterr().err
    assert "classes: label 0 is 'class0' in the resumed checkpoint and 'class1' in the images" in message
    for file in (point, exported):
        assert evaluate(["--checkpoint", str(file), *common, "--attacks", "clean"]) == 2
        assert f"label 0 is 'class0' in {file} and 'class1' in the images" in capsys.readouterr().err
    assert analyze(["--checkpoint", str(point), *common, "--split", "train"]) == 2
    assert "classes: label 0 is 'class0'" in capsys.readouterr().err
    assert finetune(data, tmp_path / "none", f"--eval --resume {point}") == 2
    assert "classes: label 0 is 'class0'" in capsys.readouterr().err
    rename(data, "zebra", "class0")
    assert evaluate(["--checkpoint", str(point), *common, "--attacks", "clean"]) == 0


def test_an_image_more_in_the_middle_of_an_epoch_begins_it_again(data, stopped, tmp_path, capsys):
    """Its order is another one."""
    first = sorted((data / "train" / "class0").iterdir())[0]
    shutil.copy(first, first.with_name("zz.png"))
    capsys.readouterr()
    assert finetune(data, stopped, "--resume auto --test_every 0") == 0
    said = capsys.readouterr().out
    assert "the training images changed (26 then, 27 now); the interrupted epoch starts again" in said
    assert "epoch 1, micro-step 0, 8 updates done" in said


def test_a_renamed_image_is_another_order_too_and_a_change_between_epochs_is_said(data, tmp_path, capsys):
    assert finetune(data, tmp_path / "run", "--max_steps 6 --test_every 0") == 0
    first = sorted((data / "train" / "class0").iterdir())[0]
    first.rename(first.with_name("zz.png"))
    assert finetune(data, tmp_path / "run", "--resume auto --max_steps 7 --test_every 0") == 0
    said = capsys.readouterr().out
    assert "resume: the training images changed (26 as before, but of other names or labels)\n" in said
    assert "epoch 1, micro-step 0, 6 updates done" in said


def test_a_single_class_is_refused(data, tmp_path, capsys):
    shutil.rmtree(data / "train" / "class1")
    shutil.rmtree(data / "val" / "class1")
    assert finetune(data, tmp_path / "run") == 2
    assert "has one class; a classifier needs two or more" in capsys.readouterr().err


def test_images_that_are_ready_are_taken_as_they_are_and_it_is_said(data, tmp_path, capsys):
    common = ["--data_root", str(data), "--device", "cpu", "--attacks", "clean", "--eval_resize", "none"]
    assert finetune(data, tmp_path / "run", "--max_steps 1 --eval_resize none") == 0
    assert "images as they are" in capsys.readouterr().out
    point = tmp_path / "run" / "resume-0-1.pth"
    assert evaluate(["--checkpoint", str(point), *common]) == 2
    assert "24x20 pixels, expected 16x16" in capsys.readouterr().err
    for path in (data / "val").rglob("*.png"):
        Image.open(path).resize((16, 16)).save(path)
    assert evaluate(["--checkpoint", str(point), *common]) == 0
    assert "on cpu, images as they are\n" in capsys.readouterr().out


def test_names_that_are_numbers_say_nothing():
    """Those of data sets whose files hold no names."""
    names = ["airplane", "bird"]
    for known, found in ((None, names), (names, ["0", "1"]), (["0", "1"], names), (names, names)):
        check_same_classes(known, found, "x")
    for known, found in ((names, names[::-1]), (names, [*names, "cat"]), (["0", "1", "10"], ["0", "1", "2x"])):
        with pytest.raises(ValueError, match=r"^classes: label \d is "):
            check_same_classes(known, found, "x")
