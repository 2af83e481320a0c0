"""A family of models is one record: with a second one in the list, everything that asks a record serves it."""

import dataclasses

import numpy as np
import pytest
import torch
from torch import Tensor

from mimir_fast.attacks.linf import linf_step
from mimir_fast.attacks.pgd_mae import linf_bounds, pgd_mae, plain_functions
from mimir_fast.checkpoints.errors import CheckpointError
from mimir_fast.checkpoints.export import architecture, timm_tensors
from mimir_fast.checkpoints.robustbench import model_file
from mimir_fast.checkpoints.trained_models import latent_tokens, load_classifier, load_encoder, load_mae
from mimir_fast.checkpoints.transfer import load_pretrained
from mimir_fast.models import (
    Classifier,
    MaskedAutoencoder,
    MaskedAutoencoderViT,
    create_classifier,
    create_model,
    families,
)
from mimir_fast.models.families import family_of, find, listed, model_names, recognise
from mimir_fast.models.families.vit import VIT
from mimir_fast.objectives.reconstruction import ReconstructionObjective
from mimir_fast.report.samples import save_samples
from mimir_fast.training.compilation import blocks_of
from mimir_fast.training.layer_decay import parameter_groups
from mimir_fast.training.pretrain_step import MaeAttack, draw_noise, pretrain_step
from tests.support.golden import small_model
from tests.support.toy_family import TOY, ToyBlock

SIZE = {"img_size": 16, "patch_size": 4}


@pytest.fixture(autouse=True)
def two_families(monkeypatch):
    monkeypatch.setattr(families, "FAMILIES", (VIT, TOY))


def saved(path, module, **args) -> str:
    torch.save({"model": module.state_dict(), "args": args}, path)
    return str(path)


def test_names():
    assert model_names(pretraining=True)[-2:] == ["mae_toy_small", "mae_toy_wide"]
    assert listed(pretraining=False) == "vit_{nano,ti,small,small_ds,base,large}, toy_{small,wide}"
    for name in ("mae_toy_tiny", "mae_toy_small"):
        assert find(name, pretraining=True) == (TOY, {"width": 8, "depth": 2})
    assert find("mae_vit_base_dec128d2b", pretraining=True)[1]["decoder_embed_dim"] == 128
    assert "decoder_depth" not in find("vit_large_patch16", pretraining=False)[1]
    for name, pretraining in (("toy_small", True), ("mae_toy_small", False), ("toy", True), ("vit_huge", False)):
        with pytest.raises(ValueError, match=f"model: unknown name '{name}'; choose one of (mae_)?vit_nano"):
            find(name, pretraining)


def test_the_sizes_of_a_decoder_are_the_autoencoders(monkeypatch):
    monkeypatch.setitem(TOY.sizes, "toy_deep", {"width": 8, "decoder_embed_dim": 512})
    assert find("mae_toy_deep", pretraining=True)[1] == {"width": 8, "decoder_embed_dim": 512}
    assert find("toy_deep", pretraining=False)[1] == {"width": 8}


def test_a_model_knows_its_family():
    autoencoder, classifier = create_model("mae_toy_small", **SIZE), create_classifier("toy_small", **SIZE)
    assert isinstance(autoencoder, MaskedAutoencoder)
    assert isinstance(classifier, Classifier)
    assert family_of(autoencoder) is family_of(classifier) is TOY
    subclass = type("Mine", (type(small_model()),), {})
    assert family_of(subclass(**SIZE, depth=1)) is VIT
    assert [type(block) for block in blocks_of(autoencoder)] == [ToyBlock] * 2
    with pytest.raises(ValueError, match="Linear is none of MaskedAutoencoderViT, VisionTransformer, ToyAutoencoder"):
        family_of(torch.nn.Linear(1, 1))
    with pytest.raises(ValueError, match="masking: expected patches or images, got 'tokens'"):
        dataclasses.replace(TOY, masking="tokens")


def test_files_are_recognised(tmp_path):
    autoencoder = create_model("mae_toy_wide", **SIZE)
    trained = load_mae(saved(tmp_path / "mae.pth", autoencoder, model="mae_toy_wide", norm_pix_loss=True))
    assert (trained.args["model"], trained.args["input_size"], trained.args["patch_size"]) == ("mae_toy_wide", 16, 4)
    assert trained.model.norm_pix_loss
    assert latent_tokens(trained, torch.rand(2, 3, 16, 16)).shape == (2, 16, 16)
    source = saved(tmp_path / "classifier.pth", create_classifier("toy_small", num_classes=5, **SIZE))
    assert load_classifier(source).args["nb_classes"] == 5
    assert load_encoder(source, overrides={"model": "toy_small"}).args["model"] == "toy_small"
    with pytest.raises(CheckpointError, match="was trained with toy_small, the command line says toy_wide"):
        load_classifier(source, overrides={"model": "toy_wide"})
    nothing = {"weight": torch.zeros(1)}
    with pytest.raises(ValueError, match="no ViT of mimir_fast: no cls_token; no toy model of mimir_fast: no table"):
        recognise(nothing)
    other = saved(tmp_path / "other.pth", create_model("mae_toy_small", width=4, **SIZE))
    with pytest.raises(CheckpointError, match="holds a toy model of width 4: none of mae_toy_small, mae_toy_wide"):
        load_mae(other)


def test_a_classifier_starts_from_its_familys_autoencoder():
    autoencoder, classifier, said = (
        create_model("mae_toy_small", **SIZE),
        create_classifier("toy_small", img_size=24),
        [],
    )
    given = autoencoder.state_dict()
    load_pretrained(classifier, given, "x.pth", said.append, 0.02)
    assert torch.equal(classifier.layers[1].layer.weight, given["encoder.layers.1.layer.weight"])
    assert torch.equal(classifier.table, TOY.resize(given["encoder.table"], (1, 36, 8)).table)
    assert said[0] == "finetune: x.pth: 15 of 17 tensors loaded"
    assert said[-1] == "  positional table resized from 4 to 6"
    with pytest.raises(CheckpointError, match=r"x.pth holds toy_wide \(width 16\), --model is toy_small \(width 8\)"):
        load_pretrained(classifier, create_model("mae_toy_wide", **SIZE).state_dict(), "x.pth", print, 0.02)
    with pytest.raises(CheckpointError, match="no whole toy model encoder: 1 missing parameter"):
        load_pretrained(classifier, {k: v for k, v in given.items() if k != "encoder.last.bias"}, "x.pth", print, 0.02)
    with pytest.raises(CheckpointError, match="it must come from a toy model"):
        load_pretrained(classifier, small_model().state_dict(), "x.pth", print, 0.02)


def test_what_only_some_files_have(tmp_path):
    """The classifier gets a place for it, and a file that is read again brings it along."""
    autoencoder, classifier = create_model("mae_toy_small", shift=True, **SIZE), create_classifier("toy_small", **SIZE)
    torch.nn.init.normal_(autoencoder.encoder.shift)
    load_pretrained(classifier, autoencoder.state_dict(), "x.pth", print, 0.02)
    assert torch.equal(classifier.shift, autoencoder.encoder.shift)
    trained = load_classifier(saved(tmp_path / "c.pth", classifier))
    assert torch.equal(trained.model.shift, classifier.shift)
    assert architecture(trained).options["shift"]
    assert load_mae(saved(tmp_path / "m.pth", autoencoder)).model.encoder.shift is not None


def test_layers_of_layer_decay():
    model = create_classifier("toy_small", **SIZE)
    names = {id(p): name for name, p in model.named_parameters()}
    groups = parameter_groups(model, 0.05, 0.5)
    decayed = {names[id(p)]: group for group in groups for p in group["params"] if group["weight_decay"]}
    assert set(decayed) == {"stem.weight", "project.weight", "head.weight"}
    scales = {names[id(p)]: group["lr_scale"] for group in groups for p in group["params"]}
    assert scales["stem.weight"] == scales["table"] == 0.125
    assert (scales["layers.0.norm.bias"], scales["layers.1.layer.bias"], scales["last.bias"]) == (0.25, 0.5, 1.0)


def test_the_attack_differentiates_whole_images():
    """Every pixel has a gradient through the stem here, those of removed patches a second one through the target."""
    torch.manual_seed(0)
    model, images = create_model("mae_toy_small", **SIZE).eval(), torch.rand(4, 3, 16, 16)
    assert plain_functions(model).step is linf_step
    draws = {"start_noise": torch.zeros_like(images), "mask_noise": torch.rand(1, 4, 16)}
    adv = pgd_mae(model, images, 0.03, 0.02, **draws)
    assert not any(p.grad is not None for p in model.parameters())
    leaf = images.clone().requires_grad_()
    loss = model(leaf, 0.75, noise=draws["mask_noise"][0])[0]
    loss.backward()
    assert torch.equal(adv, (images + 0.02 * leaf.grad.sign()).clamp(0, 1))
    assert model(adv, 0.75, noise=draws["mask_noise"][0])[0] > loss


class OneMaskForAll(MaskedAutoencoderViT):
    """A family may mask all images of a batch alike, with one row of noise."""

    def noise_shape(self, batch: int) -> tuple[int, int]:
        return 1, self.num_patches

    def visible(self, images: Tensor, ids_keep: Tensor) -> Tensor:
        return super().visible(images, ids_keep.expand(len(images), -1))

    def reconstruct(self, latent: Tensor, ids_shuffle: Tensor, images: Tensor) -> tuple[Tensor, Tensor]:
        return super().reconstruct(latent, ids_shuffle.expand(len(images), -1), images)


def test_one_mask_for_a_whole_batch(tmp_path):
    torch.manual_seed(0)
    model, images = (
        OneMaskForAll(**SIZE, embed_dim=24, depth=1, num_heads=2, decoder_embed_dim=16),
        torch.rand(3, 3, 16, 16),
    )
    attack, generator = MaeAttack(1, linf_bounds(0.03, 0.02, 0.0, 1.0, 3, "cpu")), torch.Generator().manual_seed(1)
    noise = draw_noise(generator, *model.noise_shape(3), attack)
    alike = noise._replace(
        attack_masks=[row.expand(3, -1) for row in noise.attack_masks], train_mask=noise.train_mask.expand(3, -1)
    )
    outputs = [pretrain_step(ReconstructionObjective(model), model, images, n, attack) for n in (noise, alike)]
    assert outputs[0].ids_removed.shape == (1, 12)
    assert torch.equal(outputs[0].adv, outputs[1].adv)
    assert torch.equal(outputs[0].loss, outputs[1].loss)
    where = {"mean": None, "std": None, "position": {}}
    for name, output in zip(("one", "alike"), outputs):
        save_samples(tmp_path / f"{name}.npz", images, output, 4, False, **where)
    one, rows = (np.load(tmp_path / f"{name}.npz") for name in ("one", "alike"))
    assert (one["mask"] == rows["mask"]).all()
    assert (one["recon"] == rows["recon"]).all()


def test_exports_ask_the_record(tmp_path):
    trained = load_classifier(saved(tmp_path / "c.pth", create_classifier("toy_small", num_classes=5, **SIZE)))
    built = architecture(trained)
    sizes = {"img_size": 16, "patch_size": 4, "num_classes": 5, "shift": False, "width": 8, "depth": 2}
    assert (built.name, built.options) == ("timm_toy_small", sizes)
    assert (built.pretrained_cfg["first_conv"], built.pretrained_cfg["classifier"]) == ("stem", "head.fc")
    expected = {f"body.{name}" for name in trained.model.state_dict() if not name.startswith("stem.")}
    assert set(timm_tensors(trained)) == expected
    encoder = load_mae(saved(tmp_path / "e.pth", create_model("mae_toy_small", **SIZE)))
    assert set(timm_tensors(encoder)) == expected - {"body.head.weight", "body.head.bias"}
    text = model_file(trained, tmp_path / "x.pt")
    assert "from toys import Toy\n" in text
    assert "(Toy):" in text
    assert '"width": 8' in text
