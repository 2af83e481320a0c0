"""The public names: they can be imported, their signatures stay, their docstrings say what a caller must know."""

import inspect
import json
import subprocess
import sys
import threading

import pytest
import torch

import mimir_fast
from mimir_fast import create_classifier, create_model, evaluate, nhsic, pgd_mae, renyi_mi, train
from mimir_fast.attacks.pgd_mae import ascend_reconstruction, linf_bounds
from mimir_fast.config.evaluation import EvaluateConfig
from mimir_fast.config.finetuning import FinetuneConfig
from mimir_fast.config.pretraining import PretrainConfig
from mimir_fast.config.resolve import resolve
from mimir_fast.training.running import running
from tests.support.golden import golden_images, small_model

SIGNATURES = {
    "pgd_mae": "(model, images, eps=8/255, alpha=10/255, steps=1, lo=0.0, hi=1.0, mask_ratio=0.75, start_noise=None, "
    "mask_noise=None)",
    "nhsic": "(x_md, y_me, sigma=5.0, kernel_y='gaussian', impl='auto')",
    "renyi_mi": "(x_md, z_me, alpha=1.01, sigma_x=None, sigma_z=None)",
    "create_model": "(name, *, compat=None, **options)",
    "create_classifier": "(name, *, compat=None, **options)",
    "train": "(config)",
}


@pytest.mark.parametrize("name", SIGNATURES)
def test_signatures_stay(name):
    parameters = inspect.signature(getattr(mimir_fast, name)).parameters.values()
    bare = inspect.Signature([p.replace(annotation=inspect.Parameter.empty) for p in parameters])
    expected = SIGNATURES[name].replace("10/255", repr(10 / 255)).replace("8/255", repr(8 / 255))
    assert str(bare) == expected


@pytest.mark.parametrize("name", [n for n in mimir_fast.__all__ if n not in ("__version__", "evaluate")])
def test_docstrings_tell_what_a_caller_must_know(name):
    doc = inspect.getdoc(getattr(mimir_fast, name))
    assert "Raises ValueError" in doc or "Raise ValueError" in doc
    assert "[" in doc or "options" in doc


def test_importing_the_package_is_quick_and_unknown_names_are_errors():
    code = "import sys, mimir_fast; assert 'torch' not in sys.modules; assert mimir_fast.__version__"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    with pytest.raises(AttributeError, match="no attribute 'pgd'"):
        _ = mimir_fast.pgd
    assert set(mimir_fast.__all__) <= set(dir(mimir_fast))


def test_pgd_mae_is_the_attack_of_the_training_step():
    model, images = small_model(), golden_images()[0]
    draws = {"start_noise": torch.rand_like(images) * 0.02, "mask_noise": torch.rand(3, len(images), 64)}
    adv = pgd_mae(model, images, 8 / 255, 10 / 255, steps=3, **draws)
    bounds = linf_bounds(8 / 255, 10 / 255, 0.0, 1.0, 3, "cpu")
    same = ascend_reconstruction(model, images, bounds, 3, 0.75, draws["start_noise"], draws["mask_noise"])
    assert torch.equal(adv, same)


def test_pgd_mae_takes_a_number_for_every_channel():
    mean, std = torch.tensor([0.5, 0.4, 0.3]), torch.tensor([0.2, 0.25, 0.3])
    pixels = golden_images()[0]
    images = (pixels - mean[:, None, None]) / std[:, None, None]
    eps = 8 / 255 / std
    adv = pgd_mae(small_model(), images, eps, 2 * eps, steps=2, lo=-mean / std, hi=(1 - mean) / std)
    reached = (adv - images).abs().amax(dim=(0, 2, 3))
    torch.testing.assert_close(reached, eps, rtol=1e-4, atol=1e-6)
    back = adv * std[:, None, None] + mean[:, None, None]
    assert back.min() >= -1e-6
    assert back.max() <= 1 + 1e-6


def test_pgd_mae_leaves_the_model_as_it_was():
    model = small_model().train()
    pgd_mae(model, golden_images()[0], steps=2)
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"steps": -1}, "steps: expected 0 or more, got -1"),
        ({"eps": -0.1}, "eps: expected 0 or more"),
        ({"alpha": torch.zeros(2)}, "alpha: expected 1 or 3 numbers, got 2"),
        ({"start_noise": torch.zeros(1)}, "start_noise: expected"),
        ({"steps": 2, "mask_noise": torch.rand(1, 4, 64)}, "mask_noise: expected one"),
        ({"mask_ratio": 1.0}, "mask_ratio: expected"),
    ],
)
def test_pgd_mae_names_what_is_wrong(arguments, words):
    with pytest.raises(ValueError, match=words):
        pgd_mae(small_model(), golden_images()[0], **arguments)
    with pytest.raises(ValueError, match="images: expected floats"):
        pgd_mae(small_model(), torch.zeros(1, 3, 32, 32, dtype=torch.uint8))


def test_a_training_step_by_hand():
    model = create_model("mae_vit_nano", img_size=32, patch_size=8, norm_pix_loss=True)
    images = torch.rand(4, 3, 32, 32)
    adv = pgd_mae(model, images)
    loss, _, _, latent = model(images, mask_ratio=0.75, adv_images=adv)
    penalty = nhsic(latent.flatten(1), adv.flatten(1)) + renyi_mi(adv.flatten(1), latent.flatten(1), alpha=2.0)
    (loss + 1e-5 * penalty).backward()
    assert create_classifier("vit_nano", img_size=32, patch_size=8, num_classes=10)(images).shape == (4, 10)
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_evaluate_takes_a_configuration(tmp_path):
    model = create_classifier("vit_nano", img_size=32, patch_size=8, num_classes=10)
    torch.save({"model": model.state_dict()}, tmp_path / "nano.pth")
    asked = {"checkpoint": str(tmp_path / "nano.pth"), "dataset": "digits", "num_images": 6, "attacks": "fgsm"}
    config = EvaluateConfig().updated({**asked, "device": "cpu"})
    results = evaluate(config)
    assert set(results["attacks"]) == {"clean", "fgsm eps=8"}
    assert json.loads((tmp_path / "eval" / "nano" / "results.json").read_text()) == results
    assert evaluate(config) == results
    with pytest.raises(ValueError, match="attacks: 'pdg' is no attack"):
        evaluate(config.updated({"attacks": "pdg"}))


def test_train_takes_a_configuration_twice_in_one_process(tmp_path):
    """Also in a thread of its own, as in a notebook's or a web server's: signals are then left alone."""
    shared = {"dataset": "digits", "input_size": 16, "patch_size": 4, "device": "cpu", "num_workers": 0, "max_steps": 2}
    shared |= {"batch_size": 8, "epochs": 1, "warmup_epochs": 0, "lr": 1e-3, "log_dir": ""}
    config = PretrainConfig().updated({**shared, "model": "mae_vit_nano", "attack": "pgd_mae", "mi_train": "hsic"})
    folders = [tmp_path / "first", tmp_path / "second"]
    results = [train(config.updated({"output_dir": str(folders[0])}))]
    thread = threading.Thread(target=lambda: results.append(train(config.updated({"output_dir": str(folders[1])}))))
    thread.start()
    thread.join()
    assert [(r.status, r.epoch, r.update, r.output_dir) for r in results] == [(0, 0, 2, folder) for folder in folders]
    first, second = (torch.load(f / "resume-0-2.pth", weights_only=False)["model"] for f in folders)
    assert all(torch.equal(first[name], second[name]) for name in first)
    tuning = {
        **shared,
        "model": "vit_nano",
        "finetune": str(folders[0] / "resume-0-2.pth"),
        "aa": "noaug",
        "test_every": 0,
    }
    tuned = FinetuneConfig().updated(
        {**tuning, "attack_train": "pgd", "steps": 1, "output_dir": str(tmp_path / "tuned")}
    )
    assert train(tuned).update == 2


def test_train_names_what_is_wrong():
    with pytest.raises(ValueError, match="attack: got 'plian', expected"):
        train(PretrainConfig().updated({"attack": "plian", "device": "cpu"}))
    with pytest.raises(ValueError, match="eval: got True"):
        train(FinetuneConfig().updated({"eval": True}))


def test_evaluate_is_an_attribute_of_the_package():
    code = "import mimir_fast; assert callable(mimir_fast.evaluate); assert mimir_fast.evaluate.Images"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_training_leaves_the_precision_of_matrix_products_as_it_was(monkeypatch):
    class Training:
        def run(self):
            raise AssertionError

        def close(self):
            torch.set_float32_matmul_precision("high")

    run = resolve(PretrainConfig().updated({"device": "cpu"}), {"device"})
    with running(run, lambda run, world: Training()):
        torch.set_float32_matmul_precision("high")
    assert torch.get_float32_matmul_precision() == "highest"


def test_flags_that_were_named_count_as_asked_for():
    asked = FinetuneConfig().updated({"dataset": "cifar10"}).updated({"input_size": 224})
    assert asked.given == {"dataset", "input_size"}
    assert asked.completed(set(asked.given)).model.input_size == 224
    assert asked.completed(asked.changed()).model.input_size == 32
    assert asked == FinetuneConfig().updated({"dataset": "cifar10"})
