"""What every family must provide (mimir_fast/models/family.py), held against all of them and the toy family."""

import pytest
import torch

from mimir_fast.config.pretraining import PretrainConfig
from mimir_fast.config.resolve import resolve
from mimir_fast.models import create_classifier, create_model, families
from mimir_fast.models.family import kind_of, of_head
from mimir_fast.training.options import model_options
from mimir_fast.training.precision import ComputeCopy
from tests.support.small_models import small_models
from tests.support.toy_family import TOY

ALL = (*families.FAMILIES, TOY)
# Side of the images of a test where it cannot be 16, and of the patches of the mask, of which it has 16.
SIDE = {"xcit": (32, 8)}


@pytest.fixture(autouse=True)
def all_families(monkeypatch):
    small_models(monkeypatch.setitem)
    monkeypatch.setattr(families, "FAMILIES", ALL)


@pytest.fixture(params=ALL, ids=lambda family: family.name)
def family(request):
    return request.param


def options(family) -> tuple[dict, int, int]:
    """What commands pass to a constructor, and the sides of image and patch."""
    side, patch = SIDE.get(family.name, (16, 4))
    flags = {"device": "cpu", "model": family.names(True)[0], "input_size": side, "patch_size": patch}
    return model_options(resolve(PretrainConfig().updated(flags), set())), side, patch


def test_autoencoder(family):
    """Constructor options, attributes and shapes that the base class and the record's module list."""
    passed, side, patch = options(family)
    torch.manual_seed(0)
    model, images = create_model(family.names(True)[0], norm_pix_loss=True, **passed), torch.rand(2, 3, side, side)
    assert (model.img_size, model.in_chans, model.patch_size, model.num_patches) == (side, 3, patch, 16)
    assert kind_of(family.of_classifier(model.state_dict())) == "autoencoder"
    noise = torch.rand(model.noise_shape(2))
    ids_shuffle, ids_restore, keep = model.random_masking(noise, 0.7)
    ids_keep = ids_shuffle[:, :keep]
    latent = model.encode(model.visible(images, ids_keep), ids_keep)
    assert latent.shape[:2] == (2, model.prefix_tokens + keep)
    everything = model.decode(latent, ids_shuffle, model.prefix_tokens)
    loss, pred = model.reconstruct(latent, ids_shuffle, images)
    assert (everything.shape, pred.shape) == ((2, 16, 3 * patch**2), (2, 16 - keep, 3 * patch**2))
    torch.testing.assert_close(pred, everything[:, keep:])
    # Where it has a graph, compiled code adds zeros to its gradient.
    assert [loss.requires_grad, pred.requires_grad] == [True, False]
    whole = model(images, 0.7, noise=noise)
    torch.testing.assert_close((loss, latent), (whole[0], whole[3]))
    assert torch.equal(whole[2], (ids_restore >= keep).float().expand(2, -1))
    if model.masks_on_host:
        plan = torch.from_numpy(model.host_plan(noise.numpy(), 0.7))
        torch.testing.assert_close(model.encode(model.visible(images, ids_keep), ids_keep, plan), latent)
    assert family.named(family.read(family.of_classifier(model.state_dict()))) == family.names(False)[0]


def test_classifier(family):
    passed, side, _ = options(family)
    constants = {"mean": (0.5, 0.5, 0.5), "std": (0.2, 0.2, 0.2)}
    heads = {"num_classes": 5, "global_pool": True, "drop_path": 0.1}
    model = create_classifier(family.names(False)[0], **heads, **constants, **passed)
    assert (model.img_size, model.in_chans, model.num_patches, model.num_classes) == (side, 3, 16, 5)
    assert kind_of(model.state_dict()) == "classifier"
    assert {name for name, _ in model.named_parameters() if of_head(name)} == {"head.weight", "head.bias"}
    assert model.head.out_features == 5
    images, draws = torch.rand(2, 3, side, side), torch.rand(len(model.drop_rates), model.branches, 2)
    assert torch.equal(model(images, draws), model.classify(model.forward_features(images, draws)))
    plain = create_classifier(family.names(False)[0], **heads, mean=None, std=None, **passed)
    plain.load_state_dict(model.state_dict())
    torch.testing.assert_close(model(images), plain((images - 0.5) / 0.2))
    found = family.read(model.state_dict())
    assert family.named(found) == family.names(False)[0]
    assert found["num_classes"] == 5


def test_16_bits(family):
    """Linear layers compute with 16-bit copies; every trained parameter gets a gradient."""
    passed, side, _ = options(family)
    torch.manual_seed(0)
    model = create_model(family.names(True)[0], norm_pix_loss=True, **passed)
    images = torch.rand(4, 3, side, side)
    noise = torch.rand(model.noise_shape(4))
    exact = model(images, 0.7, noise=noise)[0].item()
    copy = ComputeCopy(model, torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        loss = copy.module(images, 0.7, noise=noise)[0]
    loss.backward()
    copy.take_gradients()
    assert loss.item() == pytest.approx(exact, rel=0.02)
    grads = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert not [name for name, grad in grads.items() if grad is None or not grad.isfinite().all()]
