"""Swin beyond the recorded numbers: timm's model, windows by definition, packing, other sizes, files, exports."""

import runpy

import numpy as np
import pytest
import timm
import torch

from mimir_fast.checkpoints.errors import CheckpointError
from mimir_fast.checkpoints.export import export_robustbench, export_timm
from mimir_fast.checkpoints.trained_models import load_classifier, load_mae
from mimir_fast.checkpoints.transfer import load_pretrained, match_encoder
from mimir_fast.models import create_classifier, create_model
from mimir_fast.models.families.swin import SWIN, layers
from mimir_fast.models.families.swin.files import resize
from mimir_fast.training.parameter_ema import ParameterEMA
from tests.support.golden import small_model

SIZES = {"img_size": 48, "patch_size": 2, "embed_dim": 8, "depths": (2, 2, 1), "num_heads": (1, 2, 2), "window_size": 4}
DECODER = {"decoder_embed_dim": 16, "decoder_num_heads": 2}


def moved(model: torch.nn.Module, by: float = 0.3) -> torch.nn.Module:
    """The model with every trained parameter away from its start, where many are alike or zero."""
    torch.manual_seed(0)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += by * torch.randn_like(parameter)
    return model


def autoencoder(**options) -> torch.nn.Module:
    torch.manual_seed(1)
    return moved(create_model("swin", **{**SIZES, **DECODER, "norm_pix_loss": True, **options}))


def classifier(**options) -> torch.nn.Module:
    torch.manual_seed(1)
    return moved(create_classifier("swin", **{**SIZES, "num_classes": 5, **options}))


def noise_in_order(order: torch.Tensor) -> torch.Tensor:
    """Noise [1,L] that sorts the units so."""
    return torch.empty(1, len(order)).scatter(1, order[None], torch.arange(len(order)).float()[None] / len(order))


# ---- attention within windows


@pytest.mark.parametrize("window", [3, 4, 5])
def test_windows_by_definition(window):
    """Every block of an encoder that sees some units, token by token; 5 does not divide the side of 12."""
    model = autoencoder(img_size=24, patch_size=2, depths=(3,), num_heads=(2,), window_size=window).double()
    encoder, kept = model.encoder, torch.tensor([40, 3, 2, 5, 50, 41, 98, 52, 53, 143, 0, 12])
    units = torch.rand(2, len(kept), 12).double()
    row = torch.from_numpy(encoder.plan(len(kept)).row(kept.numpy(), wide=True))
    found = encoder.run(units, encoder.plan(len(kept)).windows(row))
    x = encoder.patch_embed(units)
    for i, block in enumerate(encoder.layers[0].blocks):
        shift = window // 2 if i % 2 else 0
        rows, columns = (torch.stack([kept // 12, kept % 12]) + (window - shift) % window) // window
        same = (rows[:, None] == rows) & (columns[:, None] == columns)
        apart = kept[:, None] // 12 - kept // 12, kept[:, None] % 12 - kept % 12
        entry = (apart[0] + window - 1) * (2 * window - 1) + apart[1] + window - 1
        table = block.attn.relative_position_bias_table[torch.where(same, entry, 0)].permute(2, 0, 1)
        q, k, v = block.attn.qkv(block.norm1(x)).unflatten(2, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        scores = (q @ k.transpose(2, 3) / 2 + table).masked_fill(~same, -torch.inf)
        x = x + block.attn.proj((scores.softmax(3) @ v).transpose(1, 2).flatten(2))
        x = x + block.mlp.fc2(torch.nn.functional.gelu(block.mlp.fc1(block.norm2(x))))
    torch.testing.assert_close(found, encoder.norm(x))


def test_the_order_of_kept_units_does_not_matter():
    """Windows are packed otherwise, and latent tokens stand in raster order."""
    model, images, order = autoencoder().double(), torch.rand(2, 3, 48, 48).double(), torch.randperm(36)
    other = torch.cat([order[:9].flip(0), order[9:]])
    first, second = (model(images, 0.75, noise=noise_in_order(ids)) for ids in (order, other))
    torch.testing.assert_close(first[1], second[1])
    torch.testing.assert_close(first[3], second[3])


def test_the_original_misplaces_latent_tokens():
    """Sorted draws make its decoder right; the encoder is right always."""
    order = torch.randperm(36, generator=torch.Generator().manual_seed(0))
    in_order = torch.cat([order[:9].sort()[0], order[9:]])
    images = torch.rand(2, 3, 48, 48).double()
    models = [autoencoder(compat=compat).double() for compat in (None, "original")]
    for ids, alike in ((order, False), (in_order, True)):
        ours, theirs = (model(images, 0.75, noise=noise_in_order(ids)) for model in models)
        assert torch.equal(ours[3], theirs[3])
        assert torch.allclose(ours[1], theirs[1]) is alike


@pytest.mark.parametrize("window", [4, 5])
def test_logits_and_constants_are_timms(window):
    """Where windows do not tile a side, timm lets filled-up tokens take part: only constants are compared then."""
    sizes = {**SIZES, "img_size": 64, "window_size": window, "num_classes": 5}
    model = moved(create_classifier("swin", **sizes)).double().eval()
    theirs = timm.models.swin_transformer.SwinTransformer(
        **sizes, norm_layer=lambda n, **_: torch.nn.LayerNorm(n, eps=1e-6)
    )
    state = timm.models.swin_transformer.checkpoint_filter_fn(model.state_dict(), theirs)
    theirs.load_state_dict(state, strict=True)
    buffers = dict(theirs.named_buffers())
    own = {name: buffer for name, buffer in model.state_dict().items() if name in dict(model.named_buffers())}
    assert len(own) == 7
    images = torch.rand(2, 3, 64, 64).double()
    if window == 4:
        assert all(torch.equal(buffers[name].to(buffer.dtype), buffer) for name, buffer in own.items())
        torch.testing.assert_close(model(images), theirs.double().eval()(images), atol=1e-11, rtol=0)
        torch.testing.assert_close(
            model.forward_features(images), theirs.forward_head(theirs.forward_features(images), True)
        )
    # Windows at the borders are seen only by themselves: pixels there reach the same tokens as in an image filled up.
    assert model(images).isfinite().all()


# ---- sizes


def test_swin_small_is_96_wide():
    """The original's is 768 wide, has 3.1e9 parameters and cannot run."""
    with torch.device("meta"):
        model = create_model("mae_swin_small")
        assert create_model("green_mim_swin_small_patch4_dec512b1").decoder_embed.in_features == 768
    assert sum(p.numel() for p in model.parameters()) == 49_735_178


@pytest.mark.parametrize(("side", "window", "ratio"), [(64, 4, 0.0), (40, 7, 0.5), (56, 3, 0.97), (8, 4, 0.0)])
def test_any_ratio_side_and_window(side, window, ratio):
    """All kept, which the original refuses, included."""
    model = autoencoder(img_size=side, window_size=window)
    units = (side // 8) ** 2
    loss, pred, mask, latent = (
        model(torch.rand(2, 3, side, side), ratio) if ratio else (torch.zeros(()), *everything(model, side))
    )
    assert (pred.shape, latent.shape) == ((2, units, 192), (2, int(units * (1 - ratio)), 32))
    assert mask.sum(1).tolist() == [units - int(units * (1 - ratio))] * 2
    assert classifier(img_size=side, window_size=window)(torch.rand(2, 3, side, side)).isfinite().all()
    assert loss.isfinite()


def everything(model, side: int):
    """Predictions, mask and latent with all units kept, which leaves the loss nothing."""
    ids = torch.arange(model.num_patches)[None]
    latent = model.encode(model.visible(torch.rand(2, 3, side, side), ids), ids)
    return model.decode(latent, ids, 0), torch.zeros(2, model.num_patches), latent


def test_wrong_sizes_name_the_argument():
    for match, call in {
        "compat: expected None or 'original', got 'old'": lambda: autoencoder(compat="old"),
        "depths: expected stages of 1 block or more": lambda: autoencoder(depths=(1, 0), num_heads=(1, 1)),
        "num_heads: expected one number for each of 3 stages": lambda: autoencoder(num_heads=(1, 2)),
        "num_heads: 3 does not divide the width 8": lambda: autoencoder(num_heads=(3, 2, 2)),
        "window_size: expected 1 or more, got 0": lambda: autoencoder(window_size=0),
        "unit: 3 stages make patches of 2 pixels units of 8, got 16": lambda: autoencoder(unit=16),
        "img_size: expected a multiple of 8, the side of a unit, got 50": lambda: autoencoder(img_size=50),
        "decoder_depth: expected 1 or more, got 0": lambda: autoencoder(decoder_depth=0),
        "drop_path_rate: pre-training leaves out no blocks": lambda: autoencoder(drop_path_rate=0.1),
        r"noise: expected \[1,36\], a row for all images": lambda: autoencoder()(
            torch.rand(2, 3, 48, 48), noise=torch.rand(2, 36)
        ),
        "mask_ratio: 0.99 keeps none of 36 patches": lambda: autoencoder()(torch.rand(2, 3, 48, 48), 0.99),
        "images": lambda: classifier()(torch.rand(2, 3, 40, 40)),
    }.items():
        with pytest.raises(ValueError, match=match):
            call()


# ---- classifiers and files


@pytest.mark.parametrize("checkpointing", [False, True])
def test_stochastic_depth_rises_over_all_stages(checkpointing):
    """A block that is left out in an image might as well not be there."""
    model = classifier(drop_path=0.4, activation_checkpointing=checkpointing)
    assert list(model.drop_rates) == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4])
    images, draws = torch.rand(2, 3, 48, 48), torch.full((5, 2, 2), 0.9)
    draws[3, :, 1] = 0.2
    found = model(images, draws)
    for i, layer in enumerate(model.layers):
        for n, block in enumerate(layer.blocks):
            scale = 1 / (1 - 0.1 * (2 * i + n))
            for linear in (block.attn.proj, block.mlp.fc2):
                linear.weight.data *= scale
                linear.bias.data *= scale
    torch.testing.assert_close(found[0], model(images)[0])
    left_out = model.layers[1].blocks[1]
    for linear in (left_out.attn.proj, left_out.mlp.fc2):
        linear.weight.data.zero_()
        linear.bias.data.zero_()
    torch.testing.assert_close(found[1], model(images)[1])


def saved(path, module, **args) -> str:
    torch.save({"model": module.state_dict(), "args": args}, path)
    return str(path)


def test_files_are_recognised_and_start_classifiers(tmp_path):
    """The original's args say patches of 16, its default, which a Swin does not follow."""
    model, said = moved(create_model("mae_swin_tiny", img_size=64)), []
    trained = load_mae(saved(tmp_path / "m.pth", model, compat="original", patch_size=16, model="mae_swin_tiny"))
    assert (trained.args["model"], trained.args["input_size"], trained.model.compat) == (
        "mae_swin_tiny",
        64,
        "original",
    )
    tuned = create_classifier("swin_tiny", img_size=128)
    before = {name: buffer.clone() for name, buffer in tuned.named_buffers()}
    load_pretrained(tuned, model.state_dict(), "x.pth", said.append, 0.02)
    assert said[0] == "finetune: x.pth: 175 of 190 tensors loaded"
    # The last stage had windows of its whole side.
    assert said[-1] == "  positional table resized from windows of 2 to windows of 4"
    assert all(torch.equal(before[name], buffer) for name, buffer in tuned.named_buffers())
    with pytest.raises(
        CheckpointError, match=r"holds swin_tiny \(width 96, depths 2-2-6-2, heads 3-6-12-24, windows of 7\)"
    ):
        load_pretrained(create_classifier("swin_base", img_size=64), model.state_dict(), "x.pth", print, 0.02)
    with pytest.raises(CheckpointError, match=r"finetune: x\.pth is no whole Swin encoder"):
        load_pretrained(tuned, small_model().state_dict(), "x.pth", print, 0.02)


def test_the_name_of_published_swin_l(tmp_path, narrow):
    """Its args say windows of 7, its tensors have 14."""
    model = create_classifier("swin_base_win14", num_classes=5)
    published = saved(tmp_path / "c.pth", model, model="swin_base_patch4_window7_224", num_classes=5)
    assert load_classifier(published).args["model"] == "swin_base_win14"
    with pytest.raises(CheckpointError, match=r"model: .*was trained with swin_base_win14, its own args say swin_tiny"):
        load_classifier(saved(tmp_path / "c.pth", model, model="swin_tiny"))
    with pytest.raises(CheckpointError, match=r"was trained with swin_base_win14, the command line says swin_base"):
        load_classifier(published, overrides={"model": "swin_base"})


def test_encoders_of_other_windows_start_classifiers():
    """Tables are resized: the same value for the same share of a window's side."""
    model = autoencoder()
    tuned = create_classifier("swin", **{**SIZES, "window_size": 6, "num_classes": 5})
    load_pretrained(tuned, model.state_dict(), "x.pth", lambda _: None, 0.02)
    match = match_encoder(tuned, model.state_dict(), "x.pth")
    assert {key.rpartition(".")[2] for key in match.misshapen} == {"relative_position_bias_table"}
    assert any(key.endswith("relative_position_index") for key in match.missing)
    # Rows and columns that tokens are apart: none stays none, and neither is taken for the other.
    entries = torch.randn(7, 7)
    table, change = resize(entries.view(49, 1), (121, 1))
    turned, _ = resize(entries.T.reshape(49, 1), (121, 1))
    assert change == "from windows of 4 to windows of 6"
    torch.testing.assert_close(table.view(11, 11)[5, 5], entries[3, 3])
    torch.testing.assert_close(turned.view(11, 11), table.view(11, 11).T)
    with pytest.raises(ValueError, match="relative positions within a window"):
        resize(torch.zeros(48, 1), (121, 1))


def test_an_average_leaves_constants_alone():
    """Averaged in fp32, as the original does, positions would be corrupted."""
    model = classifier()
    average = ParameterEMA(model, 0.9998)
    for number in range(1, 6):
        average.update(number)
    constants = [name for name in model.state_dict() if name.endswith(("attn_mask", "relative_position_index"))]
    assert len(constants) == 7
    assert all(torch.equal(average.state_dict()[name], model.state_dict()[name]) for name in constants)


@pytest.fixture
def narrow(monkeypatch):
    """Named models of few and narrow blocks."""
    for name in ("swin_tiny", "swin_base", "swin_base_win14"):
        sizes = {"embed_dim": 8, "depths": (2 + (name == "swin_tiny"), 1, 1, 1), "num_heads": (1, 1, 2, 4)}
        monkeypatch.setitem(SWIN.sizes, name, {**SWIN.sizes[name], **sizes})


@pytest.mark.parametrize(("name", "window"), [("swin_tiny", 7), ("swin_base_win14", 14)])
def test_exports(tmp_path, narrow, name, window):
    """What is written was loaded by timm, and by a class as RobustBench loads it, and gave the same outputs."""
    model = moved(create_classifier(name, num_classes=5), 0.05)
    trained = load_classifier(saved(tmp_path / "c.pth", model, dataset="imagenet", model=name, input_size=224))
    assert trained.model.window_size == window
    lines = export_timm(trained, tmp_path / "c.safetensors", tmp_path / "c.json")
    assert lines[1].startswith(f"timm.create_model('swin_{name.split('_')[1]}_patch4_window7_224', ")
    images = torch.rand(1, 3, 224, 224)
    with torch.no_grad():
        # The line as it is printed.
        torch.testing.assert_close(eval(lines[1]).eval()(images), trained.model(images), atol=1e-5, rtol=1e-5)
    export_robustbench(trained, tmp_path / "c.pt", tmp_path / "c.py")
    written = torch.load(tmp_path / "c.pt", weights_only=True)["state_dict"]
    assert list(written) == list(model.state_dict())
    assert "BicubicRes256Crop224" in (tmp_path / "c.py").read_text()
    zoo = runpy.run_path(str(tmp_path / "c.py"))["zoo_model"]()
    zoo.load_state_dict({f"model.{key}": tensor for key, tensor in written.items()}, strict=True)
    with torch.no_grad():
        torch.testing.assert_close(zoo.eval()(images), trained.model(images), atol=1e-5, rtol=1e-5)


def test_encoder_export(tmp_path, narrow):
    trained = load_mae(saved(tmp_path / "m.pth", moved(create_model("mae_swin_tiny"), 0.05)))
    lines = export_timm(trained, tmp_path / "m.safetensors", tmp_path / "m.json")
    assert "outputs differ by at most" in lines[0]


@pytest.mark.slow
def test_compiles_without_a_graph_break():
    """As training calls it: with the plan."""
    model, images, noise = autoencoder(), torch.rand(2, 3, 48, 48), torch.rand(1, 36)
    trained = [p for p in model.parameters() if p.requires_grad]
    ids, _, keep = model.random_masking(noise, 0.75)
    plan = torch.from_numpy(model.host_plan(noise.numpy(), 0.75))

    def loss(encode) -> torch.Tensor:
        return model.reconstruct(encode(model.visible(images, ids[:, :keep]), ids[:, :keep], plan), ids, images)[0]

    losses = loss(torch.compile(model.encode, fullgraph=True, backend="aot_eager")), loss(model.encode)
    assert losses[0].item() == pytest.approx(losses[1].item(), rel=1e-6)
    for ours, theirs in zip(*(torch.autograd.grad(value, trained) for value in losses)):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


def test_gradients_of_a_table_are_added_in_a_fixed_order():
    """Two threads give the same bits; a plain index adds in whatever order they come."""
    entry, grads = torch.randint(169, (21, 49, 49), dtype=torch.int32), torch.randn(21, 49, 49, 3)
    first = layers.sum_by_entry(grads, entry, 169)
    assert all(torch.equal(layers.sum_by_entry(grads, entry, 169), first) for _ in range(5))
    table = torch.zeros(169, 3, dtype=torch.float64, requires_grad=True)
    table[entry].backward(grads.double())
    torch.testing.assert_close(first.double(), table.grad, atol=1e-4, rtol=1e-4)


def test_what_is_added_to_scores_is_contiguous():
    """Else scaled_dot_product_attention falls back to plain products where one group holds all tokens."""
    model = autoencoder()
    row = torch.from_numpy(model.host_plan(np.random.default_rng(0).random((1, 36), np.float32), 0.75))
    found = model.encoder.plan(9).windows(row)
    assert {given.slots is None for given in found} == {True, False}
    for given in found:
        bias = model.encoder.stages[0].blocks[0].attn.bias(given.entry % 49, given.inside, given.outside)
        assert bias.is_contiguous()
