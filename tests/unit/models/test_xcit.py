"""XCiT beyond the recorded numbers: timm's model, removed patches, batch normalisation, 16 bits, sizes, files, exports."""

import copy
import runpy

import pytest
import timm
import torch
from torch import nn

from mimir_fast.attacks.pgd_mae import frozen_twin
from mimir_fast.checkpoints.errors import CheckpointError
from mimir_fast.checkpoints.export import export_robustbench, export_timm
from mimir_fast.checkpoints.trained_models import load_classifier, load_mae
from mimir_fast.checkpoints.transfer import load_pretrained
from mimir_fast.models import create_classifier, create_model
from mimir_fast.models.families import recognise
from mimir_fast.models.families.xcit import XCIT
from mimir_fast.models.families.xcit.attention import Grid, LocalPatches
from mimir_fast.models.families.xcit.layers import BatchNorm
from mimir_fast.training.parameter_ema import ParameterEMA
from mimir_fast.training.running_statistics import running_statistics

SIZES = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 4, "cls_attn_layers": 1}
DECODER = {"decoder_embed_dim": 16, "decoder_num_heads": 2}


def moved(model: nn.Module, by: float = 0.3) -> nn.Module:
    """The model with every parameter and running statistic away from its start, where many are alike or zero."""
    torch.manual_seed(0)
    for parameter in model.parameters():
        parameter.data += by * torch.randn_like(parameter)
    for statistic in running_statistics(model):
        statistic += by * torch.rand_like(statistic)
    return model


def autoencoder(**options) -> nn.Module:
    torch.manual_seed(1)
    return moved(create_model("xcit", **{**SIZES, **DECODER, "norm_pix_loss": True, **options}))


def classifier(**options) -> nn.Module:
    torch.manual_seed(1)
    return moved(create_classifier("xcit", **{**SIZES, "num_classes": 5, **options}))


def saved(path, module, **args) -> str:
    torch.save({"model": module.state_dict(), "args": args}, path)
    return str(path)


@pytest.fixture
def narrow(monkeypatch):
    """Named models of few and narrow blocks."""
    for name in XCIT.sizes:
        monkeypatch.setitem(XCIT.sizes, name, {"embed_dim": 16, "depth": 2, "num_heads": 4})


# ---- the image's gradient and removed patches


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("make", [autoencoder, classifier])
def test_gradients_of_a_single_image(make, training):
    """On CPUs torch's batch normalisation has a wrong gradient here; planted: BatchNorm of torch in the stem."""
    model, image = make().double().train(training), torch.rand(1, 3, 32, 32).double()
    noise = torch.rand(1, 16)

    def loss(x: torch.Tensor) -> torch.Tensor:
        fresh = copy.deepcopy(model)
        return fresh(x, noise=noise)[0] if make is autoencoder else fresh(x).square().sum()

    leaf, direction, step = image.clone().requires_grad_(), torch.randn_like(image), 1e-6
    (grad,) = torch.autograd.grad(loss(leaf), leaf)
    with torch.no_grad():
        slope = (loss(image + step * direction) - loss(image - step * direction)) / (2 * step)
    assert (grad * direction).sum().item() == pytest.approx(slope.item(), rel=1e-5, abs=1e-9)


@pytest.mark.parametrize("training", [False, True])
def test_removed_patches_reach_the_latent_in_the_originals_form_alone(training):
    noise, shares = torch.arange(32.0).view(2, 16).sin(), {}
    for compat in (None, "original"):
        model, images = autoencoder(compat=compat).double().train(training), torch.rand(2, 3, 32, 32).double()
        images.requires_grad_()
        (grad,) = torch.autograd.grad(model(images, noise=noise)[3].square().sum(), images)
        ids, _, keep = model.random_masking(noise, 0.75)
        removed = 1 - model.seen(ids[:, :keep]).view(2, 1, 4, 4)
        removed = removed.repeat_interleave(8, 2).repeat_interleave(8, 3).expand_as(grad).bool()
        shares[compat] = (grad[removed] != 0).double().mean().item()
    assert shares[None] == 0
    # Its neighbours above and to the left; through statistics of the batch all of them.
    assert (shares["original"] == 1) if training else (0.2 < shares["original"] < 0.8), shares


def test_local_patches_by_definition():
    """Zeros in removed places before both convolutions, statistics of the kept patches; planted: without the second zeros."""
    module, x, side = moved(LocalPatches(3)).double(), torch.randn(2, 4, 3).double(), 3
    ids = torch.stack([torch.randperm(9)[:4] for _ in range(2)])
    kept = torch.zeros(2, 1, 9).double().scatter(2, ids[:, None], 1.0).unflatten(2, (3, 3))
    found, batch = module(x, Grid(side, ids, kept))

    def convolved(h: torch.Tensor, conv: nn.Conv2d) -> torch.Tensor:
        """[B,3,D], place by place."""
        out = torch.zeros_like(h)
        for r in range(side):
            for c in range(side):
                for dr, dc in ((a, b) for a in (-1, 0, 1) for b in (-1, 0, 1)):
                    if 0 <= r + dr < side and 0 <= c + dc < side:
                        weight = conv.weight[:, 0, dr + 1, dc + 1]
                        out[:, 3 * r + c] += h[:, 3 * (r + dr) + c + dc] * weight
        return out + conv.bias

    grid = torch.zeros(2, 9, 3).double()
    for image in range(2):
        grid[image, ids[image]] = x[image]
    hidden = nn.functional.gelu(convolved(grid, module.conv1))
    seen = torch.cat([hidden[image, ids[image]] for image in range(2)])
    mean, var = seen.mean(0), seen.var(0, correction=0)
    hidden = (hidden - mean) / (var + 1e-5).sqrt() * module.bn.weight + module.bn.bias
    hidden = hidden * kept.view(2, 9, 1)
    out = convolved(hidden, module.conv2)
    torch.testing.assert_close(found, torch.stack([out[image, ids[image]] for image in range(2)]))
    torch.testing.assert_close(batch.mean, mean)
    torch.testing.assert_close(batch.var, seen.var(0))


def test_the_order_of_kept_patches_does_not_matter():
    images, noise = torch.rand(2, 3, 32, 32).double(), torch.rand(2, 16)
    lowest = noise.sort(dim=1)[0]
    other = torch.where(noise < lowest[:, 4:5], lowest[:, 4:5] - noise, noise)
    for compat in (None, "original"):
        model = autoencoder(compat=compat).double()
        first, second = (model(images, 0.75, noise=n) for n in (noise, other))
        assert torch.allclose(first[1], second[1]) == (compat is None)


# ---- batch normalisation


def test_batch_normalisation_is_torchs():
    ours, theirs, x = moved(BatchNorm(4)), nn.BatchNorm2d(4), torch.randn(3, 4, 5, 5)
    theirs.load_state_dict(ours.state_dict())
    for training in (True, True, False):
        torch.testing.assert_close(ours.train(training)(x), theirs.train(training)(x))
        x = 2 * x + 1
    for name, value in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], value)


def test_a_batch_that_is_not_finite_leaves_no_trace():
    """Its update is skipped; running statistics would never recover."""
    norm, x = moved(BatchNorm(4)), torch.randn(3, 4, 5, 5)
    before = copy.deepcopy(norm.state_dict())
    x[0, 2, 1, 1] = torch.inf
    norm(x)
    assert all(torch.equal(norm.state_dict()[name], value) for name, value in before.items())


def test_recomputed_blocks_count_a_batch_once():
    states = []
    for checkpointing in (False, True):
        model = autoencoder(activation_checkpointing=checkpointing)
        model(torch.ones(2, 3, 32, 32).cumsum(2) / 32, noise=torch.arange(32.0).view(2, 16).sin())[0].backward()
        states.append(model.state_dict())
    assert {int(states[1][name]) for name in states[1] if name.endswith("num_batches_tracked")} == {1}
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


def test_the_attacks_twin_follows_running_statistics_and_moves_none():
    model = autoencoder()
    twin, images, noise = frozen_twin(model).eval(), torch.rand(2, 3, 32, 32), torch.rand(2, 16)
    before = copy.deepcopy(model.state_dict())
    first = twin(images, noise=noise)[0].item()
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())
    model(images, noise=noise)
    assert not torch.equal(
        model.state_dict()["blocks.0.local_mp.bn.running_mean"], before["blocks.0.local_mp.bn.running_mean"]
    )
    assert twin(images, noise=noise)[0].item() != first


def test_an_average_has_its_own_running_statistics_and_counts_like_the_model():
    model = classifier()
    average = ParameterEMA(model, 0.9)
    before = copy.deepcopy(average.state_dict())
    for _ in range(3):
        model(torch.rand(2, 3, 32, 32))
    now = model.state_dict()
    assert all(torch.equal(average.state_dict()[name], value) for name, value in before.items() if "running" in name)
    average.update(1)
    for name, value in average.state_dict().items():
        if name.endswith("num_batches_tracked"):
            assert value.item() == now[name].item() == 3
        else:
            # 1 - d of the first update is 9/11.
            torch.testing.assert_close(value, before[name] + (now[name] - before[name]) * 9 / 11)


# ---- against timm


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(("patch", "tokens_norm"), [(8, True), (16, True), (8, False)])
def test_logits_tokens_and_gradients_are_timms(patch, tokens_norm, training):
    sizes = {**SIZES, "patch_size": patch, "num_classes": 5}
    model = classifier(patch_size=patch, tokens_norm=tokens_norm).double().train(training)
    theirs = timm.models.xcit.Xcit(**sizes, tokens_norm=tokens_norm, global_pool="token").double().train(training)
    theirs.load_state_dict(model.state_dict(), strict=True)
    images = torch.rand(2, 3, 32, 32).double()
    ours, timms = (m(images) for m in (model, theirs))
    torch.testing.assert_close(ours, timms, atol=1e-6, rtol=1e-6)
    grads = [
        torch.autograd.grad(out.square().sum(), list(m.parameters())) for m, out in ((model, ours), (theirs, timms))
    ]
    for first, second in zip(*grads):
        torch.testing.assert_close(first, second, atol=1e-5, rtol=1e-5)


def test_stochastic_depth_by_the_formula():
    """The same rate in every block of patches, for each of its three branches, none in the class token's layers."""
    rate, images, noise = 0.4, torch.rand(6, 3, 32, 32), torch.rand(2, 3, 6)
    model = classifier(drop_path=rate).eval()
    x = model.patch_embed(images) + model.pos_embed()
    for i, block in enumerate(model.blocks):
        first, second, third = (((draw >= rate) / (1 - rate))[:, None, None] for draw in noise[i])
        x = x + first * block.gamma1 * block.attn(block.norm1(x))
        x = x + second * block.gamma3 * block.local_mp(block.norm3(x), Grid(4))[0]
        x = x + third * block.gamma2 * block.mlp.fc2(nn.functional.gelu(block.mlp.fc1(block.norm2(x))))
    x = model.cls_attn_blocks[0](torch.cat([model.cls_token.expand(6, -1, -1), x], dim=1))
    found = model(images, noise)
    torch.testing.assert_close(found, model.head(model.norm(x)[:, 0]))
    assert not torch.allclose(found, model(images))


# ---- sizes, compilation, files


@pytest.mark.parametrize(("ratio", "side"), [(0.3, 24), (0.5, 40), (0.9, 40)])
def test_any_ratio_and_any_grid(ratio, side):
    model, patches = autoencoder(img_size=side), (side // 8) ** 2
    loss, pred, mask, latent = model(torch.rand(2, 3, side, side), ratio)
    kept = int(patches * (1 - ratio))
    assert (pred.shape, latent.shape) == ((2, patches, 192), (2, 1 + kept, 16))
    assert mask.sum(1).tolist() == [patches - kept] * 2
    assert loss.isfinite()


def test_wrong_sizes_name_the_argument():
    images = torch.rand(2, 3, 32, 32)
    for match, call in {
        "compat: expected None or 'original', got 'old'": lambda: autoencoder(compat="old"),
        "depth: expected 1 or more, got 0": lambda: autoencoder(depth=0),
        "cls_attn_layers: expected 1 or more, got 0": lambda: autoencoder(cls_attn_layers=0),
        "decoder_depth: expected 1 or more, got 0": lambda: autoencoder(decoder_depth=0),
        "num_heads: 5 does not divide the width 16": lambda: autoencoder(num_heads=5),
        "embed_dim: expected a multiple of 4, got 18": lambda: autoencoder(embed_dim=18, num_heads=2),
        "patch_size: XCiT's stem makes patches of 8 or 16 pixels, got 4": lambda: autoencoder(patch_size=4),
        "mask_ratio: 0.5 keeps 8 of 16 patches": lambda: autoencoder(compat="original")(images, 0.5),
        "images": lambda: classifier()(torch.rand(2, 3, 8, 8)),
    }.items():
        with pytest.raises(ValueError, match=match):
            call()


@pytest.mark.slow
def test_compiles_without_a_graph_break():
    model, images, noise = autoencoder(depth=1, decoder_depth=1), torch.rand(2, 3, 32, 32), torch.rand(2, 16)
    other = copy.deepcopy(model)
    losses = (
        torch.compile(model, fullgraph=True, backend="aot_eager")(images, noise=noise)[0],
        other(images, noise=noise)[0],
    )
    assert losses[0].item() == pytest.approx(losses[1].item(), rel=1e-6)
    for value in losses:
        value.backward()
    for ours, theirs in zip(model.parameters(), other.parameters()):
        torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-5, rtol=1e-4)
    for name, value in other.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], value)


def test_files_are_recognised_and_start_classifiers(tmp_path, narrow):
    model, said = moved(create_model("mae_xcit_small", img_size=32)), []
    assert recognise(model.state_dict()).name == "xcit"
    trained = load_mae(saved(tmp_path / "m.pth", model, compat="original", input_size=32))
    found = (trained.args["model"], trained.args["patch_size"], trained.model.compat)
    assert found == ("mae_xcit_small", 16, "original")
    # Positions are computed: any size of image will do.
    tuned = create_classifier("xcit_small", img_size=48)
    load_pretrained(tuned, model.state_dict(), "x.pth", said.append, 0.02)
    assert said[0] == f"finetune: x.pth: {len(tuned.state_dict()) - 2} of {len(tuned.state_dict())} tensors loaded"
    assert torch.equal(tuned.patch_embed.proj[0][1].running_var, model.patch_embed.proj[0][1].running_var)
    wide = create_classifier("xcit", img_size=32, embed_dim=32, depth=2, num_heads=4)
    with pytest.raises(CheckpointError, match=r"holds xcit_small \(width 16, 4 heads, depth 2 \+ 2, MLP width 64\)"):
        load_pretrained(wide, model.state_dict(), "x.pth", print, 0.02)
    cait = create_model("cait", embed_dim=16, depth=2, num_heads=4)
    with pytest.raises(CheckpointError, match=r"finetune: x\.pth is no whole XCiT encoder"):
        load_pretrained(tuned, cait.state_dict(), "x.pth", print, 0.02)


@pytest.mark.parametrize(
    ("name", "theirs"), [("xcit_small", "xcit_small_12_p16_224"), ("xcit_large", "xcit_large_24_p16_224")]
)
def test_exports(tmp_path, narrow, name, theirs):
    """What is written was loaded by timm, and by a class as RobustBench loads it, and gave the same outputs."""
    for other in XCIT.sizes.keys() - {name}:
        XCIT.sizes[other] = {"embed_dim": 32, "depth": 2, "num_heads": 4}
    model = moved(create_classifier(name, img_size=32, patch_size=8, num_classes=5), 0.05)
    # A file without args: positions say nothing of the image's side.
    trained = load_classifier(saved(tmp_path / "c.pth", model), overrides={"input_size": 32})
    lines = export_timm(trained, tmp_path / "c.safetensors", tmp_path / "c.json")
    assert lines[1].startswith(f"timm.create_model('{theirs}', ")
    export_robustbench(trained, tmp_path / "c.pt", tmp_path / "c.py")
    zoo, images = runpy.run_path(str(tmp_path / "c.py"))["load"](), torch.rand(1, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(eval(lines[1]).eval()(images), trained.model(images), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(zoo(images), trained.model(images), atol=1e-5, rtol=1e-5)


def test_encoder_export(tmp_path, narrow):
    trained = load_mae(
        saved(tmp_path / "m.pth", moved(create_model("mae_xcit_small", img_size=32), 0.05), input_size=32)
    )
    lines = export_timm(trained, tmp_path / "m.safetensors", tmp_path / "m.json")
    assert "outputs differ by at most" in lines[0]
