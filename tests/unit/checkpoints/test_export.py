"""Exported files, read by the programs that they are for."""

import argparse
import json
import resource
import runpy
import signal
from types import SimpleNamespace

import pytest
import timm
import torch
from safetensors import safe_open

from mimir_fast.checkpoints import export
from mimir_fast.checkpoints.trained_models import load_classifier, load_encoder, training_eps
from mimir_fast.cli.export import main
from mimir_fast.models import create_classifier, create_model

SIZE = {"img_size": 16, "patch_size": 4}
IMAGES = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def checkpoint(path, name="vit_nano", classes=5, global_pool=True, **args) -> str:
    torch.manual_seed(2)
    model = create_classifier(name, num_classes=classes, global_pool=global_pool, **SIZE)
    for parameter in model.parameters():  # biases and positions too
        torch.nn.init.normal_(parameter, std=0.1)
    torch.save({"model": model.state_dict(), "epoch": 9, "args": argparse.Namespace(model=name, **args)}, path)
    return str(path)


def exported(source: str, path, kind: str, *more: str) -> int:
    return main(["--checkpoint", source, "--format", kind, "--output", str(path), *more])


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(IMAGES)


@pytest.mark.parametrize("global_pool", [True, False])
def test_timm_gives_the_same_logits(tmp_path, capsys, global_pool):
    source = checkpoint(tmp_path / "checkpoint-9.pth", global_pool=global_pool, dataset="digits")
    path = tmp_path / "out.safetensors"
    assert exported(source, path, "timm") == 0
    call = capsys.readouterr().out.splitlines()[-1]
    config = json.loads((tmp_path / "out.json").read_text())
    with safe_open(path, "pt") as file:
        assert file.metadata()["create_model"] == config["create_model"] == call
    model = eval(call, {"timm": timm})
    torch.testing.assert_close(logits(model), logits(load_classifier(source).model), rtol=1e-4, atol=1e-4)
    assert timm.data.resolve_model_data_config(model)["mean"] == (0.0, 0.0, 0.0)
    assert logits(model).std() > 0.02


def test_timm_by_its_plain_name(tmp_path):
    """The sizes that a name says are not said again."""
    torch.manual_seed(0)
    model = create_classifier("vit_ti", num_classes=3).eval()
    torch.save(model.state_dict(), tmp_path / "a.pt")
    assert exported(str(tmp_path / "a.pt"), tmp_path / "b.safetensors", "timm") == 0
    config = json.loads((tmp_path / "b.json").read_text())
    assert config["architecture"] == "vit_tiny_patch16_224"
    assert config["model_args"] == {}
    options = {"num_classes": 3, "global_pool": "avg", "checkpoint_path": str(tmp_path / "b.safetensors")}
    images = torch.rand(1, 3, 224, 224)
    with torch.no_grad():
        theirs = timm.create_model("vit_tiny_patch16_224", **options).eval()(images)
        torch.testing.assert_close(theirs, model(images), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["vit_nano", "vit_small", "vit_small_ds", "vit_base", "vit_large"])
def test_the_other_sizes_fit_their_timm_names(name):
    """Built without memory: names and shapes of all parameters, and what shapes do not show."""
    args = {"model": name, "input_size": 32, "patch_size": 2, "nb_classes": 10, "global_pool": True, "dataset": None}
    with torch.device("meta"):
        ours = create_classifier(name, img_size=32, patch_size=2, num_classes=10)
        built = export.architecture(export.Trained(ours, {**args, "mean": None, "std": None}, None, ""))
        theirs = timm.create_model(built.name, **built.options)
    shapes = [{key: value.shape for key, value in model.state_dict().items()} for model in (ours, theirs)]
    assert shapes[0] == shapes[1]
    assert theirs.blocks[0].attn.num_heads == ours.blocks[0].attn.num_heads
    assert theirs.fc_norm.eps == ours.fc_norm.eps == 1e-6


def test_an_encoder_of_pretraining(tmp_path):
    torch.manual_seed(0)
    mae = create_model("mae_vit_nano", **SIZE)
    args = {"model": "mae_vit_nano", "use_normalize": True, "dataset": "cifar10"}
    torch.save({"model": mae.state_dict(), "args": args}, tmp_path / "mae.pth")
    assert exported(str(tmp_path / "mae.pth"), tmp_path / "e.safetensors", "timm") == 0
    config = json.loads((tmp_path / "e.json").read_text())
    model = eval(config["create_model"], {"timm": timm}).eval()
    mean, std = (torch.tensor(config["pretrained_cfg"][name])[:, None, None] for name in ("mean", "std"))
    trained = load_encoder(tmp_path / "mae.pth")
    with torch.no_grad():
        tokens = model.forward_features((IMAGES - mean) / std)
        torch.testing.assert_close(tokens, export.latent_tokens(trained, IMAGES), rtol=1e-4, atol=1e-4)
        assert model(IMAGES).shape == (2, 96)
    assert mean.max() > 0.4


@pytest.mark.parametrize(("dataset", "normalised"), [("cifar10", True), ("imagenet", False)])
def test_robustbench(tmp_path, dataset, normalised):
    """Its loader strips `model.` from names and, on ImageNet, puts it before all of them; then it loads strictly."""
    source = checkpoint(tmp_path / "a.pth", dataset=dataset, use_normalize=normalised)
    assert exported(source, tmp_path / "Mine2026.pt", "robustbench") == 0
    names = runpy.run_path(str(tmp_path / "Mine2026.py"))
    expected = logits(load_classifier(source).model)
    torch.testing.assert_close(logits(names["load"]()), expected, rtol=1e-4, atol=1e-4)
    state = torch.load(tmp_path / "Mine2026.pt")["state_dict"]
    assert not any("model." in key for key in state)
    model = names["zoo_model"]()
    model.load_state_dict({"model." * (dataset == "imagenet") + key: value for key, value in state.items()})
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-4)
    assert "mimir_fast" not in (tmp_path / "Mine2026.py").read_text()


@pytest.mark.parametrize("args", [{}, {"dataset": "cifar10s", "use_normalize": True}])
def test_exports_can_be_loaded_again(tmp_path, args):
    """With the normalisation, which their tensors do not say."""
    source = checkpoint(tmp_path / "a.pth", **args)
    exported(source, tmp_path / "a.safetensors", "timm")
    exported(source, tmp_path / "a.pt", "robustbench")
    for name in ("a.safetensors", "a.pt"):
        assert torch.equal(logits(load_classifier(tmp_path / name).model), logits(load_classifier(source).model))
        assert (
            training_eps(load_classifier(tmp_path / name)) == training_eps(load_classifier(source)) == args.get("eps")
        )


def test_wrong_input_is_told_in_one_line(tmp_path, capsys):
    source = checkpoint(tmp_path / "a.pth")
    mae = tmp_path / "mae.pth"
    torch.save({"model": create_model("mae_vit_nano", **SIZE).state_dict()}, mae)
    (tmp_path / "there.json").write_text("mine")
    for words, message in {
        (source, "x.pt", "timm"): "expected FILE.safetensors with --format timm",
        (source, "x.safetensors", "robustbench"): "expected FILE.pt with --format robustbench",
        (source, "no/x.pt", "robustbench"): "expected a file in a folder that exists",
        (source, "there.safetensors", "timm"): "there.json, expected --overwrite",
        (str(mae), "x.pt", "robustbench"): "is a pre-training checkpoint; fine-tune it first",
        ("absent.pth", "x.pt", "robustbench"): "no file absent.pth",
        ("", "x.pt", "robustbench"): "checkpoint: got none",
    }.items():
        assert exported(words[0], tmp_path / words[1], words[2]) == 2
        error = capsys.readouterr().err
        assert error.startswith("mimir-fast export: error: ")
        assert message in error
        assert error.count("\n") == 1
    assert (tmp_path / "there.json").read_text() == "mine"
    assert exported(source, tmp_path / "there.safetensors", "timm", "--overwrite") == 0
    assert "architecture" in (tmp_path / "there.json").read_text()


def test_other_outputs_are_noticed(tmp_path):
    """As from a timm whose LayerNorm is another one."""
    trained = load_classifier(checkpoint(tmp_path / "a.pth"))
    other = load_classifier(tmp_path / "a.pth").model
    assert export.checked(trained, other, tmp_path) == 0
    other.fc_norm.eps = 0.1
    with pytest.raises(ValueError, match=r"^output: .* would give other outputs in timm"):
        export.checked(trained, other, tmp_path)


@pytest.mark.parametrize("name", ["a.safetensors", "a.pt"])
def test_a_full_disk_is_one_line_and_status_1(tmp_path, capsys, name):
    source = checkpoint(tmp_path / "source.pth")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        assert exported(source, tmp_path / name, "timm" if name.endswith("s") else "robustbench") == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith(f"mimir-fast export: error: output: could not write {tmp_path / name}: ")
    assert [path.name for path in tmp_path.iterdir()] == ["source.pth"]


@pytest.mark.parametrize("name", ["a.safetensors", "a.pt"])
@pytest.mark.parametrize("error", [ValueError("other outputs"), KeyboardInterrupt])
def test_nothing_is_left_of_an_export_that_fails(tmp_path, monkeypatch, name, error):
    source = checkpoint(tmp_path / "source.pth")
    monkeypatch.setattr(export, "checked", lambda *args: (_ for _ in ()).throw(error))
    expected = 2 if isinstance(error, ValueError) else 130
    assert exported(source, tmp_path / name, "timm" if name.endswith("s") else "robustbench") == expected
    assert [path.name for path in tmp_path.iterdir()] == ["source.pth"]


@pytest.mark.parametrize(("size", "share"), [(224, 0.875), (384, 1.0)])
def test_timm_is_told_how_evaluation_crops(tmp_path, size, share):
    source = checkpoint(tmp_path / "checkpoint-9.pth", dataset="imagenet")
    trained = load_classifier(source)
    assert (
        export.architecture(trained._replace(args=trained.args | {"input_size": size})).pretrained_cfg["crop_pct"]
        == share
    )
    model = eval(
        export.architecture(trained).call(tmp_path / "none"),
        {"timm": SimpleNamespace(create_model=lambda _, **told: told)},
    )
    assert model["pretrained_cfg_overlay"]["crop_pct"] == 0.875
