"""Whole fine-tunings: outputs, where they start from, validation, the best epoch, wrong input."""

import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mimir_fast import cli
from mimir_fast.attacks.pgd_mae import frozen_twin
from mimir_fast.checkpoints.trained_models import load_classifier
from mimir_fast.cli.finetune import main
from mimir_fast.data import eval_batches, to_float
from mimir_fast.evaluate import finetune_eval as evaluation
from mimir_fast.models import create_classifier
from mimir_fast.training.distributed import World
from mimir_fast.training.optimizer import Updater
from mimir_fast.training.validation import Scores, build_validation_attack, validate
from mimir_fast.training.validator import Validator
from tests.support.finetune_runs import finetune, lines, load, make_data, pretrained, small_models

CPU = torch.device("cpu")


@pytest.fixture(autouse=True, scope="module")
def _tiny():
    with pytest.MonkeyPatch.context() as patch:
        small_models(patch.setitem)
        yield


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    """Two epochs of five updates from a pre-trained encoder, six images held out, average on."""
    out = tmp_path_factory.mktemp("whole")
    tensors = pretrained(out / "mae.pth")
    extra = (
        f"--finetune {out / 'mae.pth'} --held_out 6 --val_attack pgd2 --model_ema --model_ema_decay 0.5 --use_normalize"
    )
    assert finetune(data, out, f"{extra} --layer_decay 0.5 --checkpoint_steps 1") == 0
    return out, tensors


def test_logs_have_the_originals_keys_and_axes(whole):
    out, _ = whole
    epochs = lines(out / "log.txt")
    first = ["train_lr", "train_loss", "test_loss", "test_acc1", "test_acc5", "epoch", "n_parameters"]
    assert [list(row)[:7] for row in epochs] == [first] * 2
    assert {"val_loss", "val_acc1", "val_robust_acc1", "grad_norm", "images_per_s", "bad_files"} < set(epochs[0])
    model = create_classifier("vit_ti", img_size=16, patch_size=4, num_classes=2)
    assert epochs[0]["n_parameters"] == sum(p.numel() for p in model.parameters())
    updates = lines(out / "metrics.jsonl")
    assert [row["update"] for row in updates] == list(range(1, 11))
    assert updates[0]["lr"] == 0  # the warm-up starts at zero
    assert np.mean([row["lr"] for row in updates[:5]]) == pytest.approx(epochs[0]["train_lr"])
    assert np.mean([row["loss"] for row in updates[:5]]) == pytest.approx(epochs[0]["train_loss"], rel=1e-6)
    events = EventAccumulator(str(out)).Reload()
    for tag, key in (("loss", "loss"), ("lr", "lr")):
        assert [(e.step, e.value) for e in events.Scalars(tag)] == [(r["x"], pytest.approx(r[key])) for r in updates]
    for name in ("test_acc1", "test_acc5", "test_loss"):
        shown = [(e.step, e.value) for e in events.Scalars(f"perf/{name}")]
        assert shown == [(row["epoch"], pytest.approx(row[name])) for row in epochs]


def test_checkpoints_are_the_originals_with_the_average_beside(whole):
    out, _ = whole
    state = load(out / "checkpoint-1.pth")
    assert list(state)[:5] == ["model", "optimizer", "epoch", "scaler", "args"]
    args = state["args"]
    assert (args.eps, args.alpha, args.nb_classes, args.attack_train) == (8 / 255, 4 / 255, 2, "pgd")
    groups = state["optimizer"]["param_groups"]
    assert [group["lr_scale"] for group in groups] == [0.125, 0.125, 0.125, 0.25, 0.25, 0.5, 0.5, 1, 1][-len(groups) :]
    lr = lines(out / "metrics.jsonl")[-1]["lr"]
    assert [group["lr"] for group in groups] == [pytest.approx(lr * group["lr_scale"]) for group in groups]
    assert state["model_ema"].keys() == state["model"].keys()
    assert not torch.equal(state["model_ema"]["head.weight"], state["model"]["head.weight"])


def test_first_update_moves_nothing_and_the_average_follows(data, tmp_path):
    tensors = pretrained(tmp_path / "mae.pth")
    extra = f"--finetune {tmp_path / 'mae.pth'} --model_ema --model_ema_decay 0.75 --checkpoint_steps 1 --max_steps 2"
    assert finetune(data, tmp_path / "out", extra) == 0
    first, second = (load(tmp_path / "out" / f"resume-0-{n}.pth") for n in (1, 2))  # the learning rate starts at 0
    for key in ("pos_embed", "patch_embed.proj.weight", "blocks.1.mlp.fc2.bias"):
        assert torch.equal(first["model"][key], tensors[key])
    assert first["model"]["head.weight"].std() == pytest.approx(2e-2, rel=0.4)
    share = 0.75 - 0.5  # the second update moves the average by 1 - 3 / 12 at least
    expected = torch.lerp(first["model"]["head.weight"], second["model"]["head.weight"], 1 - share)
    assert torch.allclose(second["model_ema"]["head.weight"], expected)


def test_best_epoch_is_the_one_with_the_highest_robust_accuracy(whole):
    out, _ = whole
    epochs = lines(out / "log.txt")
    keys = [(row["val_robust_acc1"], row["val_acc1"]) for row in epochs]
    best = load(out / "best.pth")
    chosen = max(range(2), key=lambda i: keys[i])
    assert best["epoch"] == chosen
    assert best["mimir_fast"]["best"] == [*keys[chosen], chosen]
    assert all(acc in np.round(np.arange(7) * 100 / 6, 6) for acc, _ in np.round(keys, 6))  # six images


def test_listed_images_choose_the_best_epoch_and_the_model_is_measured_beside_its_average(data, tmp_path):
    names = sorted(path.relative_to(data / "val").as_posix() for path in (data / "val").rglob("*.*"))[1:6]
    (tmp_path / "list.txt").write_text("\n".join(names))
    extra = f"--val_list {tmp_path / 'list.txt'} --val_attack pgd2 --model_ema --model_ema_decay 0.9 --test_every 0"
    assert finetune(data, tmp_path, f"{extra} --lr 1e-2") == 0
    state, row = load(tmp_path / "checkpoint-1.pth"), lines(tmp_path / "log.txt")[-1]
    assert state["mimir_fast"]["best_by"] == ["pgd2", 8.0, str(tmp_path / "list.txt")]
    images, labels = next(iter(eval_batches("imagefolder", data, 16, 5, image_list=tmp_path / "list.txt")))
    for entry, prefix in (("model_ema", ""), ("model", "model_")):
        classifier = create_classifier("vit_ti", img_size=16, patch_size=4, num_classes=2).eval()
        classifier.load_state_dict(state[entry])
        with torch.no_grad():
            logits = classifier(to_float(images))
        assert row[f"{prefix}val_loss"] == pytest.approx(
            torch.nn.functional.cross_entropy(logits, labels).item(), rel=1e-5
        )
        assert row[f"{prefix}val_robust_acc1"] <= row[f"{prefix}val_acc1"]
    assert row["val_loss"] != row["model_val_loss"]
    rows = lines(tmp_path / "log.txt")
    chosen = max(range(2), key=lambda i: (rows[i]["val_robust_acc1"], rows[i]["val_acc1"]))
    assert load(tmp_path / "best.pth")["epoch"] == chosen


def test_validator_compares_robust_accuracy_first_then_clean():
    validator = Validator.__new__(Validator)
    validator.best = None
    seen = []
    for epoch, (robust, clean) in enumerate([(10, 50), (10, 60), (9, 99), (10, 60), (11, 1)]):
        validator.is_best = False
        validator._compare(Scores(0.0, clean, 100.0, robust), epoch)
        seen.append(validator.is_best)
    assert seen == [True, True, False, False, True]
    assert validator.best == [11, 1, 4]


def test_test_accuracy_is_that_of_the_saved_average_normalised_once(data, whole):
    out, _ = whole
    trained = load_classifier(out / "checkpoint-1.pth")  # pixels in [0,1] go in
    assert trained.model.mean is not None
    stream = eval_batches("imagefolder", data, 16, 9)
    images, labels = next(iter(stream))
    with torch.no_grad():
        logits = trained.model(to_float(images))
    row = lines(out / "log.txt")[-1]
    assert row["test_acc1"] == pytest.approx(100 * (logits.argmax(1) == labels).float().mean().item())
    assert row["test_loss"] == pytest.approx(torch.nn.functional.cross_entropy(logits, labels).item(), rel=1e-5)
    assert row["test_acc5"] == 100


class Brightness(torch.nn.Module):
    """Ten classes by mean brightness: class 1 above 0.5, else class 0; the pixel's sign decides the gradient."""

    def forward(self, images):
        mean = images.mean(dim=(1, 2, 3)) - 0.5
        logits = torch.stack([-mean, mean], dim=1)
        return torch.cat([logits, torch.full((len(images), 8), -9.0)], dim=1)


def shades(*levels: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Batches of two grey images of these levels, all of class 1."""
    images = torch.stack([torch.full((3, 4, 4), level, dtype=torch.uint8) for level in levels])
    return [
        (images[i : i + 2], torch.ones(len(images[i : i + 2]), dtype=torch.int64)) for i in range(0, len(levels), 2)
    ]


@pytest.mark.parametrize("val_attack", ["fgsm", "pgd3"])
def test_validation_counts_every_image_and_moves_pixels_by_eps(val_attack):
    attack = build_validation_attack(val_attack, 8.0, CPU)
    stream = shades(200, 140, 134, 137, 20)  # the threshold is 127.5: 134 falls to an attack of 8, 137 does not
    scores = validate(Brightness(), stream, World(), torch.float32, attack)
    assert (scores.acc1, scores.acc5) == (80.0, 100.0)
    assert scores.robust_acc1 == 60.0
    assert validate(Brightness(), stream, World(), torch.float32, attack, fill=3) == scores
    assert validate(Brightness(), stream, World(), torch.float32).robust_acc1 is None
    assert validate(Brightness(), stream, World(), torch.float32, ends=lambda: True) is None


def test_robust_accuracy_of_the_test_images_where_none_are_held_out(data, tmp_path):
    assert finetune(data, tmp_path, "--epochs 3 --val_attack fgsm --val_every 2 --test_every 3 --batch_size 13") == 0
    rows = lines(tmp_path / "log.txt")
    assert ["robust_acc1" in row for row in rows] == [False, True, True]
    assert [row["test_acc1"] is None for row in rows] == [True, False, False]
    assert all(row["robust_acc1"] <= row["test_acc1"] for row in rows[1:])
    assert not (tmp_path / "best.pth").exists()


def test_cadence_of_the_original_and_no_folder(data, tmp_path, monkeypatch):
    extra = "--epochs 52 --batch_size 26 --test_every 0 --attack_train plain --patch_size 8 --drop_path 0"
    assert finetune(data, tmp_path, extra) == 0
    kept = sorted((p.name for p in tmp_path.glob("*.pth")), key=lambda name: int(name[11:-4]))
    assert kept == [f"checkpoint-{epoch}.pth" for epoch in (0, 20, 40, 49, 51)]
    monkeypatch.chdir(tmp_path / "..")
    before = sorted(tmp_path.parent.rglob("*"))
    assert finetune(data, tmp_path, f"{extra} --max_steps 1 --output_dir= --log_dir=") == 0
    assert sorted(tmp_path.parent.rglob("*")) == before


@pytest.mark.parametrize(
    "extra",
    [
        "--attack_train plain --aa rand-m9-mstd0.5-inc1 --reprob 0.5 --mixup 0.8 --cutmix 1.0",
        "--attack_train trades --accum_iter 2 --cls_token",
        "--attack_train mart --alpha_warmup_epochs 1",
        "--attack_train apgd --mixup 0.8 --clip_grad 0.1 --residual_dtype bf16 --precision bf16",
        "--attack_train pgd --precision fp16 --warmup_aa --start_epoch 6 --epochs 8 --activation_checkpointing --max_steps 38",
        "--attack_train pgd_best --mi_loss dib_mi",
    ],
)
def test_every_kind_of_training_runs(data, tmp_path, extra):
    assert finetune(data, tmp_path, f"--max_steps 2 --log_every 1 {extra}") == 0
    rows = lines(tmp_path / "metrics.jsonl")
    assert all(row["loss"] > 0 and row["grad_norm"] > 0 and row["skipped_steps"] == 0 for row in rows[-2:])


def test_gradients_are_clipped_after_their_norm_is_told():
    weight = torch.nn.Parameter(torch.zeros(4))
    updater = Updater(torch.optim.SGD([weight], lr=1.0, fused=True), CPU, False, max_norm=0.5)
    updater.backward((weight * torch.tensor([3.0, 0, 0, 4.0])).sum(), 1)
    assert updater.update() == pytest.approx(5.0)
    assert weight.tolist() == pytest.approx([-0.3, 0, 0, -0.4], rel=1e-4)
    updater.backward((weight * 0.01).sum(), 1)  # a small one stays
    updater.update()
    assert weight.tolist() == pytest.approx([-0.31, -0.01, -0.01, -0.41], rel=1e-4)


def test_the_information_term_changes_the_training(data, tmp_path):
    for name, extra in (
        ("none", ""),
        ("some", "--mi_loss dib_mi --mi_xz 1 --mi_yz 0"),
        ("zero", "--mi_loss dib_mi --mi_xz 0 --mi_yz 0"),
    ):
        assert finetune(data, tmp_path / name, f"{extra} --max_steps 2 --warmup_epochs 0") == 0
    losses = {name: lines(tmp_path / name / "metrics.jsonl")[0]["loss"] for name in ("none", "some", "zero")}
    assert losses["none"] == pytest.approx(losses["zero"])
    assert losses["some"] > losses["none"] + 0.1


def test_diverging_run_ends_with_status_1_and_its_state(data, tmp_path, capsys):
    assert finetune(data, tmp_path, "--lr 1e30 --warmup_epochs 0 --max_bad_steps 3 --log_every 1 --epochs 9") == 1
    assert "max_bad_steps" in capsys.readouterr().out
    (failed,) = tmp_path.glob("failed-*.pth")
    state = load(failed)
    assert state["batch"]["images"].dtype == torch.uint8
    assert set(state["batch"]["labels"].tolist()) <= {0, 1}
    assert state["mimir_fast"]["counters"][2] == 3


def other_model(path) -> None:
    torch.save(
        {"model": create_classifier("vit_small", img_size=16, patch_size=4, num_classes=2, depth=1).state_dict()}, path
    )


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        ("--data_root nowhere", ["nowhere"]),
        ("--model vit_huge", ["model", "vit_huge", "vit_ti"]),
        ("--nb_classes 5", ["nb_classes", "5", "2"]),
        ("--held_out 26", ["held_out", "26"]),
        ("--held_out 2 --val_list list.txt", ["val_list", "not by both"]),
        ("--val_list none.txt", ["none.txt", "cannot be read"]),
        ("--finetune nowhere.pth", ["finetune", "nowhere.pth"]),
        ("--finetune {other}", ["finetune", "other.pth", "vit_ti"]),
        ("--resume {other}", ["resume", "other.pth", "another model"]),
        ("--eps 0.031", ["eps", "1/255"]),
        ("--aa rond-m9", ["aa"]),
        ("--batch_size 400", ["batch_size"]),
        ("--accum_iter 7", ["accum_iter", "7"]),
        ("--weight_decay -0.1", ["weight_decay", "-0.1"]),
        ("--device cuda:9", ["device", "cuda:9", "--device cpu"]),
        ("--layer_decay 0", ["layer_decay"]),
        ("--model_ema --model_ema_decay 1", ["ema_decay"]),
    ],
)
def test_wrong_input_is_one_line_and_status_2(data, tmp_path, capsys, extra, words):
    other_model(tmp_path / "other.pth")
    assert finetune(data, tmp_path / "out", extra.format(other=tmp_path / "other.pth")) == 2
    err = capsys.readouterr().err.strip().splitlines()
    assert len(err) == 1
    assert all(word in err[0] for word in words), err
    assert not list((tmp_path / "out").glob("*.pth"))


def test_test_images_of_other_classes_and_labels_out_of_range(data, tmp_path, capsys):
    folder = make_data(tmp_path / "images")
    (folder / "val" / "class1").rename(folder / "val" / "another")
    assert finetune(folder, tmp_path / "out") == 2
    err = capsys.readouterr().err.strip().splitlines()
    assert len(err) == 1
    (folder / "val").rename(folder / "elsewhere")
    assert finetune(folder, tmp_path / "out") == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert str(folder / "val") in line
    assert line.endswith("to train without test images: --test_every 0")
    assert finetune(folder, tmp_path / "out", "--val_attack fgsm") == 2
    advice = "--test_every 0 --val_attack fgsm --held_out 2 --max_steps 1"
    assert capsys.readouterr().err.strip().endswith("--test_every 0, --val_attack on --held_out N images (or none)")
    assert finetune(folder, tmp_path / "out", advice) == 0
    rng = np.random.default_rng(0)
    for i in range(8):
        for split in ("train", "val"):
            path = tmp_path / "cifar10" / split / f"class{i % 10}" / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(path)
    np.savez(tmp_path / "edm.npz", image=rng.integers(0, 256, (9, 32, 32, 3), dtype=np.uint8), label=np.full(9, 17))
    extra = f"--dataset cifar10 --use_edm --patch_size 8 --aux_data_filename {tmp_path / 'edm.npz'}"
    assert finetune(tmp_path, tmp_path / "out", extra) == 2
    err = capsys.readouterr().err.strip().splitlines()
    assert len(err) == 1
    assert "class" in err[0]


def test_eval_runs_the_originals_sequence(data, whole, monkeypatch, capsys):
    out, _ = whole
    seen = {}

    def fake(model, source, images, attacks, output_dir, **options):
        seen.update(model=model, images=images, attacks=[a.name for a in attacks], folder=output_dir, **options)

    monkeypatch.setattr(evaluation, "run_evaluation", fake)
    places = ["--data_root", str(data), "--device", "cpu", "--batch_size", "5"]
    assert main(["--eval", "--resume", str(out / "best.pth"), *places]) == 0
    assert seen["attacks"][0] == "clean"
    assert seen["attacks"] == ["clean", "pgd-5", "pgd-20", "pgd-100"]
    assert "AutoAttack is left out, it needs 4 classes" in capsys.readouterr().out
    monkeypatch.setattr(evaluation, "refusal", lambda num_classes: "")
    assert main(["--eval", "--resume", str(out / "best.pth"), *places]) == 0
    assert seen["attacks"][-1] == "aa"
    assert (seen["images"].dataset, seen["images"].input_size, seen["sizes"].batch) == ("imagefolder", 16, 5)
    assert seen["folder"] == out / "eval" / "best"
    assert main(["--eval", "--adap_eval", "--resume", str(out / "best.pth"), *places]) == 0
    assert seen["attacks"][1:] == ["pgd-feature-100", "pgd-mi-100"]
    assert seen["team"].world.size == 1
    assert main(["--eval", "--resume", str(out / "mae.pth"), *places]) == 2
    assert "pre-training checkpoint" in capsys.readouterr().err


def test_the_rated_model_follows_the_trained_one():
    model = create_classifier("vit_ti", img_size=16, patch_size=4, num_classes=2)
    twin = frozen_twin(model).eval()
    with torch.no_grad():
        model.head.bias += 1
    assert torch.equal(twin.head.bias, model.head.bias)
    assert not any(p.requires_grad for p in twin.parameters())


def test_out_of_memory_is_one_line_and_status_1(data, tmp_path, monkeypatch, capsys):
    def run(loop):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has 79 GiB.\nSee ...")

    monkeypatch.setattr("mimir_fast.training.loop.Loop.run", run)
    assert finetune(data, tmp_path) == 1
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("mimir-fast finetune: error: batch_size: CUDA out of memory; pass a smaller one")


def test_wandb_and_digits_demo(data, tmp_path, monkeypatch, capsys):
    logged = []
    session = SimpleNamespace(log=lambda row, step: logged.append((step, row)), finish=lambda: None)
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=lambda **words: session))
    places = ["--output_dir", str(tmp_path), "--log_dir", "", "--max_steps", "2", "--batch_size", "8", "--wandb"]
    assert cli.main(["finetune", "--recipe", "digits_demo", *places]) == 0
    assert [step for step, _ in logged] == [1, 2]
    assert "training from scratch" in capsys.readouterr().out
    logged.clear()
    assert finetune(data, tmp_path / "epoch", "--wandb --epochs 1") == 0
    assert [step for step, _ in logged] == [*range(1, 7), 6]
    assert {"epoch/test_acc1", "epoch/train_loss"} <= logged[-1][1].keys()
    with pytest.raises(SystemExit):
        cli.main(["finetune", "-h"])
    assert "digits_demo" in capsys.readouterr().out
