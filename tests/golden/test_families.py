"""Numbers recorded from the original's families beside the ViT: what it computes (original), and the corrected form.

Predictions are compared, not losses alone: those hardly see a token in a wrong place.
"""

import hashlib
import json

import pytest
import torch
from torch import Tensor

from mimir_fast.attacks.linf import gradient
from mimir_fast.attacks.pgd_mae import frozen_twin, image_reconstruction, linf_bounds, pgd_mae
from mimir_fast.checkpoints.transfer import load_pretrained, match_encoder
from mimir_fast.models import Classifier, MaskedAutoencoder, create_classifier, create_model, families
from mimir_fast.models.families import family_of
from mimir_fast.objectives.adversarial_losses import cross_entropy
from mimir_fast.training import layer_decay
from mimir_fast.training.finetune_step import ClassifierAttack, attack_images
from mimir_fast.training.optimizer import parameter_groups
from tests.support.family_golden import CLASSES, classifier, images, recorded, recorded_autoencoder, sizes
from tests.support.golden import GOLDEN
from tests.support.interpreter import interpret

FAMILIES = ["convit", "cait", "swin", "xcit"]
# The recorded forward pass that is a family's own: another ratio, or evaluation mode.
OWN = {"convit": "normpix_r44", "cait": "normpix_r50", "swin": "normpix_r50", "xcit": "normpix_r75_eval"}
FORWARDS = [(f, name) for f in FAMILIES for name in ("normpix_r75", OWN[f], "pix_r75", "normpix_adv_r75")]
# Families whose corrected form computes something else.
CORRECTED = ["convit", "swin", "xcit"]
# Of a family's gradients in fp32: XCiT's go through statistics of the batch.
BOUND = {"convit": 1e-5, "cait": 1e-5, "swin": 2e-5, "xcit": 1e-4}
NAMED = json.loads((GOLDEN / "named_models.json").read_text())


def forward(family: str, name: str, compat: str | None, dtype: torch.dtype):
    """Model, recorded draw, and loss, predictions, mask, latent."""
    tensors, record = recorded(f"{family}_{name}")
    model = recorded_autoencoder(family, compat, record["norm_pix_loss"], dtype)
    model.train(record.get("training_mode", True))
    clean, adv, _ = images(family)
    seen = adv.to(dtype) if record.get("adv_images") else None
    return model, tensors, model(clean.to(dtype), record["mask_ratio"], seen, tensors["mask_noise"])


def largest(difference: Tensor) -> float:
    return difference.abs().max().item()


# ---- names and states


def listing(model: torch.nn.Module) -> str:
    lines = "".join(f"{name} {list(tensor.shape)}\n" for name, tensor in model.state_dict().items())
    return hashlib.sha256(lines.encode()).hexdigest()


def entries() -> list[str]:
    """The recorded names of these families, as far as the original can build their models."""
    return [entry for entry in NAMED if any(family in entry for family in FAMILIES) and entry != "mae_swin_small 224"]


@pytest.mark.parametrize("entry", entries())
def test_named_models(entry):
    """Keys, shapes and their order, parameter counts, what is frozen."""
    record, name = NAMED[entry], entry.removeprefix("ares ").split()[0]
    options = {key: value for key, value in record["call"].items() if key in ("img_size", "patch_size", "num_classes")}
    with torch.device("meta"):
        create = create_model if name.startswith(("mae_", "green_mim_")) else create_classifier
        model = create(name, **options)
    assert listing(model) == record["sha256"]
    assert len(model.state_dict()) == record["keys"]
    assert sum(p.numel() for p in model.parameters()) == record["parameters"]
    assert [n for n, p in model.named_parameters() if not p.requires_grad] == record["frozen"]
    assert len(list(model.buffers())) >= record["buffers"]


@pytest.mark.parametrize("family", FAMILIES)
def test_state_and_what_a_fresh_model_holds(family):
    state, record = recorded(f"{family}_mae_state")
    model = recorded_autoencoder(family, None)
    assert list(model.state_dict()) == record["key_order"]
    assert [name for name, p in model.named_parameters() if p.requires_grad] == record["trainable_order"]
    torch.manual_seed(0)
    fresh = create_model(family, **sizes(family)).state_dict()
    for name, value in record["fresh_constants"].items():
        expected = torch.eye(len(fresh[name])) if value == "identity" else torch.tensor(value)
        assert torch.equal(fresh[name], expected.expand_as(fresh[name])), name
    for table in record["frozen"]:
        assert largest(fresh[table] - state[table]) < 1e-6


# ---- forward passes and gradients


@pytest.mark.parametrize(("family", "name"), FORWARDS)
def test_forward(family, name):
    _, tensors, (loss, pred, mask, latent) = forward(family, f"forward_{name}", "original", torch.float64)
    assert abs(loss.item() - tensors["loss64"].item()) < 1e-11
    assert largest(latent - tensors["latent64"]) < 1e-11
    assert torch.equal(mask, tensors["mask"])
    _, tensors, (single, rounded, _, latent) = forward(family, f"forward_{name}", "original", torch.float32)
    assert single.item() == pytest.approx(tensors["loss"].item(), rel=1e-6)
    assert largest(latent - tensors["latent"]) < 1e-5
    # Last: of some recordings they are in the whole set alone.
    assert largest(pred - tensors["pred64"]) < 1e-11
    assert largest(rounded - tensors["pred64"]) < 1e-5


@pytest.mark.parametrize(("family", "name"), [(f, n) for f, n in FORWARDS if f in CORRECTED])
def test_corrected_forward(family, name):
    _, tensors, (loss, pred, mask, latent) = forward(family, f"forward_{name}", None, torch.float64)
    found = {"loss64": loss, "pred64": pred, "latent64": latent}
    kept = {name: value for name, value in found.items() if f"{name}_corrected" in tensors}
    assert "loss64" in kept
    assert all(largest(value - tensors[f"{name}_corrected"]) < 1e-11 for name, value in kept.items())
    assert torch.equal(mask, tensors["mask"])
    # The losses of both agree to three digits.
    assert (pred - tensors["pred64"]).norm() > 0.03 * pred.norm()


@pytest.mark.parametrize("family", ["convit", "xcit"])
def test_a_ratio_that_the_original_refuses(family):
    _, tensors, (loss, pred, mask, latent) = forward(family, "corrected_normpix_r50", None, torch.float64)
    assert abs(loss.item() - tensors["loss64"].item()) < 1e-11
    assert largest(pred - tensors["pred64"]) < 1e-11
    assert largest(latent - tensors["latent64"]) < 1e-11
    assert torch.equal(mask, tensors["mask"])


@pytest.mark.parametrize(
    "name", ["xcit_forward_normpix_r75", "xcit16_forward_normpix_r75", "xcit16_forward_normpix_r75_eval"]
)
def test_both_stems_and_what_running_statistics_follow(name):
    """XCiT's stems for patches of 8 and of 16 pixels."""
    family, _, recording = name.partition("_")
    model, tensors, (loss, _, _, latent) = forward(family, recording, "original", torch.float64)
    assert abs(loss.item() - tensors["loss64"].item()) < 1e-11
    assert largest(latent - tensors["latent64"]) < 1e-11
    after = {name.removeprefix("after/"): value for name, value in tensors.items() if name.startswith("after/")}
    assert bool(after) == model.training
    state = model.state_dict()
    assert all(largest(state[name] - value) < 1e-6 for name, value in after.items())
    before = recorded(f"{family}_mae_state")[0]
    counted = {int(state[name] - before[name]) for name in state if name.endswith("num_batches_tracked")}
    assert counted == {int(model.training)}


CASES = [*((family, "original", "") for family in FAMILIES), *((family, None, "_corrected") for family in CORRECTED)]


@pytest.mark.parametrize(("family", "compat", "suffix"), CASES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_every_parameter_gradient(family, compat, suffix, dtype):
    bound = 2e-7 if dtype == torch.float64 else BOUND[family]
    truth, record = recorded(f"{family}_forward_normpix_r75_grads64{suffix}")
    model, _, (loss, *_) = forward(family, "forward_normpix_r75", compat, dtype)
    loss.backward()
    grads = {f"grad/{name}": p.grad for name, p in model.named_parameters() if p.requires_grad}
    for name in (f"grad/{name}" for name in record["exactly_zero"]):
        assert not grads[name].any(), name
        truth[name] = torch.zeros_like(grads[name])
    assert grads.keys() == truth.keys()
    assert_close_gradients(grads, truth, bound)


def assert_close_gradients(grads: dict[str, Tensor], truth: dict[str, Tensor], bound: float) -> None:
    """Within the bound of each gradient's maximum, or of 1 % of the largest of all."""
    scale = max(largest(t) for t in truth.values())
    for name, expected in truth.items():
        assert largest(grads[name] - expected) < bound * max(largest(expected), 1e-2 * scale), name


# ---- attacks


@pytest.mark.parametrize(("family", "compat", "suffix"), CASES)
@pytest.mark.parametrize("steps", [1, 3])
def test_attack_to_the_last_pixel(family, compat, suffix, steps):
    name = f"{family}_attack_unit_{steps}step"
    if steps == 3 and suffix:
        pytest.skip("the corrected attack was recorded with one step")
    (drawn, record), (final, _) = recorded(name), recorded(name + suffix)
    model = recorded_autoencoder(family, compat, dtype=torch.float32).eval()
    masks = [drawn[f"step{i}_mask_noise"] for i in range(steps)]
    bounds = (record["eps_255"] / 255, record["alpha_255"] / 255)
    adv = pgd_mae(model, images(family)[0], *bounds, steps, start_noise=drawn["start_noise"], mask_noise=masks)
    assert (adv - final["adv"]).abs().gt(1e-6).sum() <= 4


@pytest.mark.parametrize(("family", "compat", "suffix"), CASES)
def test_input_gradient_of_the_attack(family, compat, suffix):
    """Of whole images; the attack itself differentiates patches."""
    (drawn, _), (final, _) = recorded(f"{family}_attack_unit_1step"), recorded(f"{family}_attack_unit_1step{suffix}")
    model = recorded_autoencoder(family, compat).eval()
    start = (images(family)[0] + drawn["start_noise"]).clamp(0, 1).double()
    ids_shuffle, _, keep = model.random_masking(drawn["step0_mask_noise"], 0.75)
    _, grad = gradient(lambda leaf: image_reconstruction(model, leaf, ids_shuffle, keep), start, 1.0)
    assert largest(grad - final["step0_grad64"]) < 1e-6 * largest(grad)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_kernels_compute_the_same(family):
    """Triton's, interpreted: predictions and the attack's pixels."""
    form = "_corrected" if family in CORRECTED else ""
    drawn, record = recorded(f"{family}_attack_unit_1step")
    tensors, _ = recorded(f"{family}_forward_normpix_r75")
    clean, bounds = images(family)[0], (record["eps_255"] / 255, record["alpha_255"] / 255)

    def model() -> MaskedAutoencoder:
        return recorded_autoencoder(family, None, dtype=torch.float32, kernels="triton", attention="short")

    with interpret():
        pred = model()(clean, 0.75, noise=tensors["mask_noise"])[1]
        masks = [drawn["step0_mask_noise"]]
        adv = pgd_mae(model().eval(), clean, *bounds, 1, start_noise=drawn["start_noise"], mask_noise=masks)
    assert largest(pred - tensors[f"pred64{form}"]) < 1e-5
    assert (adv - recorded(f"{family}_attack_unit_1step{form}")[0]["adv"]).abs().gt(1e-6).sum() <= 4


# ---- classifiers


def recorded_classifier(family: str, compat: str | None = "original") -> Classifier:
    """The encoder of the recorded autoencoder under the recorded head, in evaluation mode."""
    model = classifier(family, compat)
    load_pretrained(model, recorded(f"{family}_mae_state")[0], "recorded", lambda _: None, 0.02)
    model.load_state_dict(recorded(f"{family}_cls_state")[0], strict=False)
    return model.eval()


@pytest.mark.parametrize("family", FAMILIES)
def test_what_a_pretrained_encoder_gives(family):
    (_, record), (state, pretrained) = recorded(f"{family}_cls_state"), recorded(f"{family}_mae_state")
    model = classifier(family)
    shapes = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    assert list(model.state_dict()) == record["key_order"]
    assert shapes == record["shapes"]
    given = {key: state[key] for key in pretrained["key_order"]}
    match = match_encoder(model, given, "recorded")
    assert match.missing == record["missing"]
    assert match.unexpected == record["unexpected"]
    load_pretrained(model, given, "recorded", lambda _: None, 0.02)
    held = model.state_dict()
    assert all(torch.equal(held[name], state[name]) for name in match.tensors)


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_features_and_losses(family):
    tensors, record = recorded(f"{family}_cls_forward")
    clean, _, labels = images(family)
    model = recorded_classifier(family).double()
    logits = model(clean.double())
    assert largest(logits - tensors["logits64"]) < 1e-11
    assert largest(model.forward_features(clean.double()) - tensors["features64"]) < 1e-11
    assert cross_entropy(logits, labels).item() == pytest.approx(record["ce64"], abs=1e-11)
    assert cross_entropy(logits, labels, 0.1).item() == pytest.approx(record["label_smoothing_0p164"], abs=1e-11)
    soft = cross_entropy(logits, tensors["soft_labels"].double())
    assert soft.item() == pytest.approx(record["soft_target_ce64"], abs=1e-11)
    assert largest(model.float()(clean) - tensors["logits"]) < 1e-5
    if "logits64_train" in tensors:
        assert largest(recorded_classifier(family).double().train()(clean.double()) - tensors["logits64_train"]) < 1e-11


def test_convit_keeps_the_biases_of_its_encoder():
    """The original drops them: its logits differ by a quarter."""
    tensors, _ = recorded("convit_cls_forward")
    model = recorded_classifier("convit", None).double()
    assert largest(model(images("convit")[0].double()) - tensors["logits64_corrected"]) < 1e-11
    assert largest(tensors["logits64_corrected"] - tensors["logits64"]) > 0.1
    assert model.head.out_features == CLASSES


def test_the_eps_of_pretraining():
    """A Swin classifier of the original's fine-tuning has 1e-5 in place of 1e-6."""
    tensors, _ = recorded("swin_cls_forward")
    model = recorded_classifier("swin").double()
    for module in model.modules():
        if isinstance(module, torch.nn.LayerNorm):
            assert module.eps == 1e-6
            module.eps = 1e-5
    assert largest(model(images("swin")[0].double()) - tensors["logits64_eps1e-5"]) < 1e-11
    assert largest(tensors["logits64_eps1e-5"] - tensors["logits64"]) > 1e-6


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_of_the_classifier(family):
    truth, _ = recorded(f"{family}_cls_grads64")
    clean, _, labels = images(family)
    for dtype, bound in ((torch.float64, 2e-7), (torch.float32, 3e-5)):
        model = recorded_classifier(family).to(dtype)
        cross_entropy(model(clean.to(dtype)), labels, 0.1).backward()
        grads = {f"grad/{name}": p.grad for name, p in model.named_parameters()}
        assert grads.keys() == truth.keys()
        assert_close_gradients(grads, truth, bound)


@pytest.mark.parametrize("family", FAMILIES)
def test_pgd_on_the_classifier(family):
    tensors, record = recorded(f"{family}_cls_attack_unit_2step")
    clean, _, labels = images(family)
    bounds = linf_bounds(record["eps_255"] / 255, record["alpha_255"] / 255, 0.0, 1.0, 3, "cpu")
    attack = ClassifierAttack("pgd", record["steps"], bounds)
    model = frozen_twin(recorded_classifier(family))
    adv = attack_images(model, clean, labels, tensors["start_noise"], attack)
    assert (adv - tensors["adv"]).abs().gt(1e-6).sum() <= 4


# ---- optimizer groups


def named(groups: list[dict], model: torch.nn.Module) -> list[dict]:
    names = {id(p): name for name, p in model.named_parameters()}
    return [group | {"params": [names[id(p)] for p in group["params"]]} for group in groups]


@pytest.mark.parametrize("family", FAMILIES)
def test_parameter_groups_of_pretraining(family):
    _, record = recorded(f"{family}_pretrain_param_groups")
    model = recorded_autoencoder(family, None)
    assert named(parameter_groups(model, record["weight_decay"]), model) == record["groups"]


@pytest.mark.parametrize(("compat", "tag"), [("original", "original"), (None, "corrected")])
@pytest.mark.parametrize("family", FAMILIES)
def test_layer_decay(family, compat, tag):
    _, record = recorded(f"{family}_layer_decay")
    if record[tag] == "raises AttributeError":
        pytest.skip("the original cannot do this: compat changes nothing")
    model = classifier(family, compat)
    assert family_of(model).name == family
    groups = named(layer_decay.parameter_groups(model, record["weight_decay"], record["layer_decay"]), model)
    assert [g["params"] for g in groups] == [g["params"] for g in record[tag]]
    assert [g["weight_decay"] for g in groups] == [g["weight_decay"] for g in record[tag]]
    assert [g["lr_scale"] for g in groups] == pytest.approx([g["lr_scale"] for g in record[tag]], rel=1e-12)


def test_every_family_but_the_vit_is_held_to_its_recordings():
    assert {family.name for family in families.FAMILIES} - {"vit"} == set(FAMILIES)
