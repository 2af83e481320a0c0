"""The masked autoencoder beyond the recorded fixtures: names, sizes, initialisation, other implementations."""

import pytest
import torch

from mimir_fast.models import MaskedAutoencoderViT, create_model
from mimir_fast.models.families.vit import VIT
from tests.oracles.textbook import TextbookMAE
from tests.support.golden import SMALL, small_model

PARAMETERS_224 = {"nano": 1.07, "ti": 6.07, "small": 22.24, "small_ds": 48.56, "base": 86.42, "large": 303.95}
PARAMETERS_32 = {"nano": 0.92, "ti": 5.85, "small": 21.88, "small_ds": 47.93, "base": 85.79}


@pytest.mark.parametrize(("size", "patch", "millions"), [(224, 16, PARAMETERS_224), (32, 2, PARAMETERS_32)])
def test_names_and_parameter_counts(size, patch, millions):
    for name, expected in millions.items():
        with torch.device("meta"):
            model = create_model(f"mae_vit_{name}_dec128d2b", img_size=size, patch_size=patch)
        assert round(sum(p.numel() for p in model.parameters()) / 1e6, 2) == pytest.approx(expected, abs=0.011), name
        keys = {"large": 326, "small_ds": 134, "nano": 86}.get(name, 182)
        assert len(model.state_dict()) == keys
    assert {f"mae_vit_{name}" for name in PARAMETERS_224} == set(VIT.names(pretraining=True))


def test_default_name_of_the_original_exists():
    with torch.device("meta"):
        model = create_model("mae_vit_ti_patch16")
    assert model.cls_token.shape == (1, 1, 192)
    with pytest.raises(ValueError, match="mae_vit_gigantic"):
        create_model("mae_vit_gigantic")


def test_initialisation_rules():
    torch.manual_seed(1)
    model = create_model("mae_vit_ti", img_size=32, patch_size=4)
    for name, p in model.state_dict().items():
        if name.endswith("norm1.weight") or name == "norm.weight":
            assert torch.all(p == 1)
        elif p.ndim == 2:
            bound = (6 / sum(p.shape)) ** 0.5
            assert bound * 0.97 < p.abs().max() <= bound, name
        elif (
            p.ndim == 1
            and name != "patch_embed.proj.bias"
            and not name.endswith("norm2.weight")
            and "norm.w" not in name
        ):
            assert torch.all(p == 0), name
    weight, bias = model.patch_embed.proj.weight.detach(), model.patch_embed.proj.bias.detach()
    assert weight.abs().max() <= (6 / (192 + 48)) ** 0.5
    assert weight.std().item() == pytest.approx((2 / (192 + 48)) ** 0.5, rel=0.05)
    assert 0 < bias.abs().max() <= 48**-0.5  # a convolution's own default
    for token in (model.cls_token, model.mask_token):
        assert token.std().item() == pytest.approx(0.02, rel=0.25)


@pytest.mark.parametrize(
    ("size", "patch", "ratio", "batch", "norm"),
    [
        (32, 4, 0.75, 3, True),
        (28, 14, 0.5, 1, False),
        (24, 8, 0.3, 2, True),
        (48, 16, 0.6, 5, False),
        (20, 2, 0.9, 2, True),
    ],
)
def test_equals_the_textbook_model(size, patch, ratio, batch, norm):
    """Another implementation (all patches embedded, then gathered; timm's blocks; einsum patches) with the same weights."""
    torch.manual_seed(2)
    options = {**SMALL, "img_size": size, "patch_size": patch, "norm_pix_loss": norm}
    ours = MaskedAutoencoderViT(**options)
    plain = TextbookMAE(**options)
    plain.load_state_dict(ours.state_dict(), strict=True)
    images, adv = torch.rand(2, batch, 3, size, size)
    noise = torch.rand(batch, (size // patch) ** 2)
    results = [model(images, ratio, adv, noise) for model in (ours, plain)]
    assert results[0][3].shape[1] == 1 + int(ours.num_patches * (1 - ratio))
    for mine, theirs in zip(*results):
        assert (mine - theirs).abs().max() < 1e-5
    assert abs(results[0][0] - results[1][0]) < 1e-6
    grads = [
        torch.autograd.grad(r[0], [p for p in m.parameters() if p.requires_grad])
        for r, m in zip(results, (ours, plain))
    ]
    for (name, _), mine, theirs in zip([n for n in ours.named_parameters() if n[1].requires_grad], *grads):
        assert (mine - theirs).abs().max() < 1e-5 * max(1.0, theirs.abs().max()), name


def test_wrong_inputs_name_the_argument():
    model = small_model()
    images = torch.rand(2, 3, 32, 32)
    for match, call in {
        "imgs": lambda: model(torch.rand(2, 3, 16, 16)),
        "adv_images": lambda: model(images, adv_images=images[:1]),
        "noise": lambda: model(images, noise=torch.rand(2, 5)),
        "mask_ratio": lambda: model(images, mask_ratio=1.0),
        "patch_size": lambda: MaskedAutoencoderViT(img_size=30, patch_size=4),
        "num_heads": lambda: MaskedAutoencoderViT(embed_dim=100, num_heads=3),
        "embed_dim": lambda: MaskedAutoencoderViT(embed_dim=6, num_heads=3),
    }.items():
        with pytest.raises(ValueError, match=match):
            call()


def test_float64_and_non_contiguous_images():
    model = small_model(dtype=torch.float64)
    images = torch.rand(2, 32, 32, 3, dtype=torch.float64).permute(0, 3, 1, 2)
    noise = torch.rand(2, 64, dtype=torch.float64)
    assert torch.equal(model(images, noise=noise)[0], model(images.contiguous(), noise=noise)[0])


def test_compiles_without_a_graph_break():
    model = small_model()
    images, noise = torch.rand(2, 3, 32, 32), torch.rand(2, 64)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    loss = compiled(images, noise=noise)[0]
    loss.backward()
    grads = [p.grad.clone() for p in model.parameters() if p.requires_grad]
    model.zero_grad()
    expected = model(images, noise=noise)[0]
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    for mine, p in zip(grads, [p for p in model.parameters() if p.requires_grad]):
        assert (mine - p.grad).abs().max() < 1e-6
