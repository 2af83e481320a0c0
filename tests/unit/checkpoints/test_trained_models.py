"""Loading trained models: what a file says about itself, what must agree, and whose parameters are taken."""

import argparse

import pytest
import torch
from safetensors.torch import save_file

from mimir_fast.checkpoints.errors import CheckpointError
from mimir_fast.checkpoints.trained_models import latent_tokens, load_classifier, load_encoder, load_mae, normalised
from mimir_fast.data.datasets import INFO
from mimir_fast.models import create_classifier, create_model
from mimir_fast.models.families.vit import VIT

SIZE = {"img_size": 16, "patch_size": 4}
IMAGES = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module", autouse=True)
def _nano():
    """A named architecture that is quick to build."""
    sizes = {"embed_dim": 24, "depth": 2, "num_heads": 3}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(VIT.sizes, "vit_nano", sizes)
        yield


@pytest.fixture(scope="module")
def classifier(_nano):
    torch.manual_seed(3)
    model = create_classifier("vit_nano", num_classes=7, **SIZE).eval()
    torch.nn.init.normal_(model.head.bias)
    return model


@pytest.fixture(scope="module")
def mae(_nano):
    torch.manual_seed(4)
    return create_model("mae_vit_nano", norm_pix_loss=True, **SIZE).eval()


def args(**more) -> argparse.Namespace:
    """What the original's fine-tuning leaves in a checkpoint of this model; sizes from the command line, not the data set."""
    own = {"model": "vit_nano", "patch_size": 4, "input_size": 224, "nb_classes": 1000, "global_pool": True}
    return argparse.Namespace(**{**own, "dataset": "cifar10", "use_normalize": False, "eps": 8 / 255, **more})


def saved(path, model, **entries) -> str:
    torch.save({"model": model.state_dict(), "epoch": 49, "args": args(), **entries}, path)
    return str(path)


def same(a, b) -> bool:
    with torch.no_grad():
        return torch.equal(a(IMAGES), b(IMAGES))


def test_checkpoint_of_the_original(tmp_path, classifier):
    trained = load_classifier(saved(tmp_path / "checkpoint-49.pth", classifier))
    assert same(trained.model, classifier)
    assert (trained.epoch, trained.args["nb_classes"], trained.args["input_size"]) == (49, 7, 16)
    assert trained.args["mean"] is None
    assert not trained.model.training
    assert not any(p.requires_grad for p in trained.model.parameters())


def test_averaged_parameters_come_first(tmp_path, classifier):
    averaged = {f"module.{name}": 0.5 * tensor for name, tensor in classifier.state_dict().items()}
    trained = load_classifier(saved(tmp_path / "a.pth", classifier, model_ema=averaged))
    assert torch.equal(trained.model.head.weight, 0.5 * classifier.head.weight)
    assert trained.source.endswith("(model_ema)")


@pytest.mark.parametrize("dataset", ["cifar10", "cifar10s", "tiny-imagenets", "imagenette"])
def test_normalisation_moves_into_the_model(tmp_path, classifier, dataset):
    """Names of runs with generated images end in s; their constants are the data set's."""
    trained = load_classifier(saved(tmp_path / "a.pth", classifier, args=args(dataset=dataset, use_normalize=True)))
    info = INFO["cifar10" if dataset.startswith("cifar") else "imagenet"]
    mean, std = (torch.tensor(values)[:, None, None] for values in (info.mean, info.std))
    with torch.no_grad():
        torch.testing.assert_close(trained.model(IMAGES), classifier((IMAGES - mean) / std), rtol=0, atol=1e-6)


def test_bare_and_wrapped_state_dicts(tmp_path, classifier):
    """As RobustBench's and the original's evaluation scripts take them."""
    state = classifier.state_dict()
    wrapped = {f"module.base_model.{name}": tensor for name, tensor in state.items()}
    torch.save(state, tmp_path / "bare.pt")
    torch.save({"model_state_dict": wrapped}, tmp_path / "wrapped.pt")
    save_file(state, tmp_path / "a.safetensors")
    for name in ("bare.pt", "wrapped.pt", "a.safetensors"):
        trained = load_classifier(tmp_path / name)
        assert same(trained.model, classifier), name
        assert trained.args["model"] == "vit_nano"


def test_half_precision_is_read_as_fp32(tmp_path, classifier):
    torch.save({name: tensor.half() for name, tensor in classifier.state_dict().items()}, tmp_path / "half.pt")
    assert {p.dtype for p in load_classifier(tmp_path / "half.pt").model.parameters()} == {torch.float32}


def test_class_token_models(tmp_path):
    model = create_classifier("vit_nano", num_classes=3, global_pool=False, **SIZE).eval()
    torch.save(model.state_dict(), tmp_path / "a.pt")
    trained = load_classifier(tmp_path / "a.pt")
    assert same(trained.model, model)
    assert trained.args["global_pool"] is False


def test_mae(tmp_path, mae):
    path = saved(tmp_path / "a.pth", mae, args={"model": "mae_vit_nano_dec128d2b", "norm_pix_loss": True})
    trained = load_mae(path)
    assert trained.model.norm_pix_loss
    assert torch.equal(trained.model.decoder_pred.weight, mae.decoder_pred.weight)
    assert trained.args["model"] == "mae_vit_nano"


def test_latent_of_an_autoencoder_is_its_encoder_on_all_patches(tmp_path, mae):
    """The classifier with the same parameters sees all patches."""
    path = saved(tmp_path / "a.pth", mae, args={"use_normalize": True, "dataset": "cifar10"})
    trained = load_encoder(path)
    info = INFO["cifar10"]
    twin = create_classifier("vit_nano", global_pool=False, mean=info.mean, std=info.std, **SIZE)
    twin.load_state_dict(mae.state_dict(), strict=False)
    with torch.no_grad():
        expected = twin.norm(twin.forward_features(IMAGES))
        torch.testing.assert_close(latent_tokens(trained, IMAGES), expected, rtol=1e-5, atol=1e-5)
    assert not torch.equal(normalised(trained, IMAGES), IMAGES)


def test_latent_of_a_classifier(tmp_path, classifier):
    trained = load_encoder(saved(tmp_path / "a.pth", classifier))
    with torch.no_grad():
        assert torch.equal(latent_tokens(trained, IMAGES), classifier.forward_features(IMAGES))


def test_the_other_kind_is_named(tmp_path, classifier, mae):
    with pytest.raises(CheckpointError, match=r"is a pre-training checkpoint; fine-tune it first"):
        load_classifier(saved(tmp_path / "mae.pth", mae))
    with pytest.raises(CheckpointError, match=r"is a classifier; expected a masked autoencoder"):
        load_mae(saved(tmp_path / "vit.pth", classifier))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"model": "vit_small"}, "^model: .* was trained with vit_nano, the command line says vit_small"),
        ({"patch_size": 8}, "^patch_size: .* with 4, the command line says 8"),
        ({"input_size": 32}, "^input_size: .* with 16, the command line says 32"),
        ({"nb_classes": 10}, "^nb_classes: .* with 7, the command line says 10"),
        ({"global_pool": False}, "^global_pool: .* with True, the command line says False"),
        ({"use_normalize": True, "dataset": "flowers"}, "^dataset: .* flowers, whose constants are not known"),
        ({"colour": "red"}, "^colour: expected one of model, input_size"),
    ],
)
def test_overrides_that_contradict_the_tensors(tmp_path, classifier, overrides, message):
    path = saved(tmp_path / "a.pth", classifier)
    with pytest.raises(ValueError, match=message):
        load_classifier(path, overrides=overrides)


def test_args_that_contradict_the_tensors(tmp_path, classifier):
    path = saved(tmp_path / "a.pth", classifier, args=args(model="vit_base"))
    with pytest.raises(CheckpointError, match=r"^model: .* with vit_nano, its own args say vit_base"):
        load_classifier(path)
    load_classifier(saved(tmp_path / "b.pth", classifier), overrides={"model": "vit_nano", "patch_size": None})


def test_files_that_are_no_models(tmp_path, classifier):
    state = classifier.state_dict()
    (tmp_path / "damaged.pth").write_bytes(b"PK")
    (tmp_path / "damaged.safetensors").write_bytes(b"PK")
    torch.save([1], tmp_path / "list.pth")
    torch.save({"model": {"stem.weight": torch.ones(1)}, "args": args(model="xcit_small")}, tmp_path / "xcit.pth")
    torch.save({name: t for name, t in state.items() if "head" not in name}, tmp_path / "encoder.pth")
    torch.save({**state, "extra": torch.ones(1)}, tmp_path / "extra.pth")
    torch.save({name: t for name, t in state.items() if "blocks.1." not in name}, tmp_path / "shallow.pth")
    for name, message in {
        "absent.pth": "no file",
        "absent.safetensors": "no file",
        "damaged.pth": "is damaged",
        "damaged.safetensors": "is damaged",
        "list.pth": "holds list, expected a dictionary",
        "xcit.pth": "no ViT of mimir_fast.*args say xcit_small",
        "encoder.pth": "is an encoder alone",
        "extra.pth": "is no vit_nano: 1 unexpected parameter .e.g. extra",
        "shallow.pth": "depth 1,",
    }.items():
        with pytest.raises(CheckpointError, match=message):
            load_classifier(tmp_path / name)
