"""ConViT beyond the recorded numbers: positions, timm's model, stochastic depth, sizes, files, exports."""

import pytest
import timm
import torch
from torch import Tensor

from mimir_fast.checkpoints.errors import CheckpointError
from mimir_fast.checkpoints.export import export_timm
from mimir_fast.checkpoints.robustbench import model_file
from mimir_fast.checkpoints.trained_models import load_classifier, load_mae
from mimir_fast.checkpoints.transfer import load_pretrained
from mimir_fast.models import create_classifier, create_model
from mimir_fast.models.families.convit.attention import GatedAttention, offsets, raster
from tests.support.golden import small_model

SIZES = {"img_size": 16, "patch_size": 4, "embed_dim": 6, "depth": 3, "num_heads": 4, "local_up_to_layer": 2}
DECODER = {"decoder_embed_dim": 16, "decoder_num_heads": 2}


def moved(model: torch.nn.Module) -> torch.nn.Module:
    """The model with every trained parameter away from its start, where many are alike or zero."""
    torch.manual_seed(0)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.3 * torch.randn_like(parameter)
    return model


def autoencoder(**options) -> torch.nn.Module:
    torch.manual_seed(1)
    return moved(create_model("convit", **SIZES, **DECODER, norm_pix_loss=True, **options))


def saved(path, module, **args) -> str:
    torch.save({"model": module.state_dict(), "args": args}, path)
    return str(path)


# ---- positions


def test_the_order_of_kept_patches_does_not_matter():
    """To the original it does: there they are a grid in that order."""
    images, noise = torch.rand(2, 3, 16, 16).double(), torch.rand(2, 16)
    lowest = noise.sort(dim=1)[0]
    # The same patches are kept, in reverse.
    other = torch.where(noise < lowest[:, 4:5], lowest[:, 4:5] - noise, noise)
    for compat, close in ((None, True), ("original", False)):
        model = autoencoder(compat=compat).double()
        first, second = (model(images, 0.75, noise=n) for n in (noise, other))
        assert torch.equal(first[2], second[2])
        assert ((first[1] - second[1]).abs().max().item() < 1e-12) is close
        assert torch.allclose(first[3][:, 1:].flip(1), second[3][:, 1:]) is close


def test_all_patches_are_encoded_alike_by_both_forms():
    images, everything = torch.rand(2, 3, 16, 16), torch.arange(16).expand(2, -1)
    models = [autoencoder(compat=compat) for compat in (None, "original")]
    ours, theirs = (model.encode(model.visible(images, everything), everything) for model in models)
    torch.testing.assert_close(ours, theirs)


def test_attention_by_its_definition():
    """Query by query and key by key, also for queries that are the last tokens alone."""
    torch.manual_seed(0)
    attention = moved(GatedAttention(8, 2)).double()
    places, x = raster(3)[:, [4, 0, 8, 3, 7]], torch.randn(2, 5, 8).double()
    q, k = (t.unflatten(2, (2, 4)) for t in attention.qk(x).chunk(2, dim=2))
    v, gate = attention.v(x).unflatten(2, (2, 4)), attention.gating_param.sigmoid()
    expected = torch.zeros(2, 5, 2, 4).double()
    for image, head in torch.cartesian_prod(torch.arange(2), torch.arange(2)).tolist():
        for i in range(5):
            content = torch.stack([q[image, i, head] @ k[image, j, head] / 2 for j in range(5)]).softmax(0)
            d = [(places[:, j] - places[:, i]).double() for j in range(5)]
            score = [attention.pos_proj.weight[head] @ torch.stack([*t, t @ t]) for t in d]
            weights = (1 - gate[head]) * content + gate[head] * torch.stack(score).softmax(0)
            expected[image, i, head] = weights @ v[image, :, head]
    expected = expected.flatten(2) @ attention.proj.weight.T
    torch.testing.assert_close(attention(x, 0, offsets(places)), expected)
    torch.testing.assert_close(attention(x, 2, offsets(places)), expected[:, 2:])
    of_each = offsets(places[:, None].expand(-1, 2, -1))
    torch.testing.assert_close(attention(x, 0, of_each), expected)


@pytest.mark.parametrize("shared", [True, False])
def test_the_gate_in_weights_and_projection_is_the_same(shared):
    """Values and gradients, queries being the last tokens alone."""
    torch.manual_seed(0)
    layer, x = moved(GatedAttention(8, 2)).double(), torch.randn(2, 5, 8, dtype=torch.float64, requires_grad=True)
    kept = torch.tensor([[4, 0, 8, 3, 7], [2, 1, 6, 5, 0]])
    given = offsets(raster(3)[:, kept[0] if shared else kept])
    q, k = (t.unflatten(2, (2, 4)).transpose(1, 2) for t in layer.qk(x).chunk(2, dim=2))
    v = layer.v(x).unflatten(2, (2, 4))
    content = (q[:, :, 2:] @ k.mT / 2).softmax(-1) @ v.transpose(1, 2)
    found, expected = layer.folded(content.transpose(1, 2), v, 2, given), layer(x, 2, given)
    torch.testing.assert_close(found, expected)
    wanted = [x, *(p for name, p in layer.named_parameters() if name != "proj.bias")]
    upstream = torch.randn(2, 3, 8, dtype=torch.float64)
    for ours, theirs in zip(*(torch.autograd.grad(out, wanted, upstream) for out in (found, expected))):
        torch.testing.assert_close(ours, theirs)


def test_the_gate_is_folded_in_bf16_where_kernels_are(monkeypatch):
    """kernels="triton" stands for a GPU here."""
    monkeypatch.setattr(GatedAttention, "folded", lambda self, content, v, query_start, offsets: None)
    for dtype, kernels, folds in [
        (torch.bfloat16, "triton", True),
        (torch.float16, "triton", False),
        (torch.float32, "triton", False),
        (torch.bfloat16, "reference", False),
    ]:
        layer = GatedAttention(8, 2, kernels=kernels).to(dtype)
        assert (layer(torch.randn(1, 4, 8, dtype=dtype), 0, offsets(raster(2))) is None) == folds


def test_a_local_block_starts_at_nine_places():
    """Of nine heads each looks at a neighbour of its own; a tenth has none."""
    attention = GatedAttention(20, 10)
    attention.look_around(30.0, torch.nn.init.zeros_)
    weights = attention.pos_proj(offsets(raster(5)))[:, 12]
    assert sorted(weights[:9].argmax(1).tolist()) == [6, 7, 8, 11, 12, 13, 16, 17, 18]
    assert weights[:9].amax(1).min() > 0.99
    torch.testing.assert_close(weights[9], torch.full((25,), 1 / 25))
    # Column first: head 1 is a row further down than head 0.
    assert weights[1].argmax() - weights[0].argmax() == 5


def test_bf16_copies_leave_positions_alone():
    """Positional weights are no linear layer, of which a 16-bit copy would compute."""
    assert not any("pos_proj" in n for n, m in autoencoder().named_modules() if isinstance(m, torch.nn.Linear))
    score = GatedAttention(8, 2).pos_proj
    torch.nn.init.normal_(score.weight)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(score(offsets(raster(16))), score.float()(offsets(raster(16))))


# ---- the classifier


@pytest.mark.parametrize("biases", [False, True])
def test_logits_and_tokens_are_timms(biases):
    model = moved(create_classifier("convit_ti", img_size=32, patch_size=8, num_classes=5, qkv_bias=biases)).eval()
    options = {"img_size": 32, "patch_size": 8, "num_classes": 5, "qkv_bias": biases}
    theirs = timm.create_model("convit_tiny", **options).eval()
    theirs.load_state_dict(model.state_dict(), strict=True)
    images = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(model(images), theirs(images), atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(
            model.forward_features(images), theirs.forward_features(images), atol=1e-4, rtol=1e-4
        )


@pytest.mark.parametrize("checkpointing", [False, True])
def test_stochastic_depth_by_the_formula(checkpointing):
    rate, images, noise = 0.6, torch.rand(6, 3, 16, 16), torch.rand(3, 2, 6)
    options = {"drop_path": rate, "num_classes": 5, "activation_checkpointing": checkpointing}
    model = moved(create_classifier("convit", **SIZES, **options))
    x = model.patch_embed(model.patchify(images)) + model.pos_embed
    for i, block in enumerate(model.blocks):
        attention, mlp = ((draw >= rate * i / 2) / (1 - rate * i / 2) for draw in noise[i])
        if i == 2:
            x = torch.cat([model.cls_token.expand(6, -1, -1), x], dim=1)
        given = (offsets(raster(4)),) if i < 2 else ()
        x = x + attention[:, None, None] * (block.attn(block.norm1(x), 0, *given) + block.attn.proj.bias)
        hidden = torch.nn.functional.gelu(block.mlp.fc1(block.norm2(x)))
        x = x + mlp[:, None, None] * block.mlp.fc2(hidden)
    expected, found = model.head(model.norm(x)[:, 0]), model(images, noise)
    torch.testing.assert_close(found, expected)
    assert not torch.allclose(found, model(images))
    parameters = list(model.parameters())
    for ours, theirs in zip(*(torch.autograd.grad(out.square().sum(), parameters) for out in (found, expected))):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-3)


# ---- sizes, compilation


@pytest.mark.parametrize("ratio", [0.3, 0.5, 0.6, 0.9])
def test_any_ratio_and_any_grid(ratio):
    model = create_model("convit", **{**SIZES, "img_size": 20}, **DECODER)
    loss, pred, mask, latent = model(torch.rand(2, 3, 20, 20), ratio)
    kept = int(25 * (1 - ratio))
    assert pred.shape == (2, 25, 48)
    assert latent.shape == (2, 1 + kept, 24)
    assert mask.sum(1).tolist() == [25 - kept] * 2
    assert loss.isfinite()


def test_wrong_sizes_name_the_argument():
    images = torch.rand(2, 3, 16, 16)
    for match, call in {
        "mask_ratio: 0.5 keeps 8 of 16 patches": lambda: autoencoder(compat="original")(images, 0.5),
        "compat: expected None or 'original', got 'old'": lambda: autoencoder(compat="old"),
        "local_up_to_layer: got 3, expected 1 to 2": lambda: create_model("convit", **SIZES | {"local_up_to_layer": 3}),
        "decoder_depth: got 3, expected 1 to 2": lambda: autoencoder(decoder_depth=3),
        "num_heads: 3 does not divide the width 16": lambda: create_model(
            "convit", **SIZES, **DECODER | {"decoder_num_heads": 3}
        ),
        "patch_size": lambda: create_model("convit", **SIZES | {"patch_size": 3}),
        "images": lambda: create_classifier("convit", **SIZES)(torch.rand(2, 3, 8, 8)),
    }.items():
        with pytest.raises(ValueError, match=match):
            call()


@pytest.mark.slow
@pytest.mark.parametrize("compat", [None, "original"])
def test_compiles_without_a_graph_break(compat):
    model, images, noise = autoencoder(compat=compat), torch.rand(2, 3, 16, 16), torch.rand(2, 16)
    trained = [p for p in model.parameters() if p.requires_grad]
    losses = (
        torch.compile(model, fullgraph=True, backend="aot_eager")(images, noise=noise)[0],
        model(images, noise=noise)[0],
    )
    assert losses[0].item() == pytest.approx(losses[1].item(), rel=1e-6)
    for ours, theirs in zip(*(torch.autograd.grad(loss, trained) for loss in losses)):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


# ---- files


def test_files_are_read_as_they_were_trained(tmp_path):
    sizes = {"img_size": 16, "patch_size": 4}
    model = moved(create_model("mae_convit_ti", compat="original", **sizes))
    source = saved(tmp_path / "m.pth", model, model="mae_convit_tiny_dec128d2b", compat="original")
    trained = load_mae(source)
    assert (trained.args["model"], trained.args["input_size"], trained.model.compat) == (
        "mae_convit_ti",
        16,
        "original",
    )
    images, noise = torch.rand(2, 3, 16, 16), torch.rand(2, 16)
    torch.testing.assert_close(trained.model(images, noise=noise)[1], model(images, noise=noise)[1].detach())
    assert load_mae(source, overrides={"compat": "none"}).model.compat is None
    biased = create_classifier("convit_ti", qkv_bias=True, num_classes=3, **sizes)
    assert load_classifier(saved(tmp_path / "b.pth", biased)).model.blocks[11].attn.qkv.bias is not None
    plain = load_classifier(saved(tmp_path / "p.pth", create_classifier("convit_ti", num_classes=3, **sizes)))
    assert len(plain.model.state_dict()) == 180
    other = saved(tmp_path / "o.pth", create_classifier("convit", **SIZES))
    with pytest.raises(
        CheckpointError, match="a ConViT of width 24, 4 heads, depth 3, 2 of it local, MLP width 96: none of"
    ):
        load_classifier(other)


def test_biases_of_the_encoder_are_kept_and_positions_resized():
    model, said = autoencoder(), []
    classifier = create_classifier("convit", **SIZES | {"img_size": 24})
    load_pretrained(classifier, model.state_dict(), "x.pth", said.append, 0.02)
    assert torch.equal(classifier.blocks[1].attn.v.bias, model.blocks[1].attn.v.bias)
    assert torch.equal(classifier.blocks[2].attn.qkv.bias, model.blocks[2].attn.qkv.bias)
    assert said[-1] == "  positional table resized from 4 x 4 to 6 x 6 patches"
    grid = model.pos_embed.detach().unflatten(1, (4, 4)).permute(0, 3, 1, 2)
    expected = torch.nn.functional.interpolate(grid, (6, 6), mode="bicubic").flatten(2).transpose(1, 2)
    torch.testing.assert_close(classifier.pos_embed.detach(), expected)
    # What is there already stays: an optimizer may have it.
    before = classifier.blocks[0].attn.qk.bias
    load_pretrained(classifier, model.state_dict(), "x.pth", said.append, 0.02)
    assert classifier.blocks[0].attn.qk.bias is before
    with pytest.raises(CheckpointError, match=r"finetune: x.pth is no whole ConViT encoder: \d+ missing parameters"):
        load_pretrained(classifier, small_model().state_dict(), "x.pth", print, 0.02)


@pytest.mark.parametrize("biases", [False, True])
def test_exports(tmp_path, biases):
    """What is written was loaded by timm, and gave the same outputs."""
    sizes = {"img_size": 16, "patch_size": 4}
    model = moved(create_classifier("convit_ti", num_classes=5, qkv_bias=biases, **sizes))
    trained = load_classifier(saved(tmp_path / "c.pth", model))
    lines = export_timm(trained, tmp_path / "c.safetensors", tmp_path / "c.json")
    assert lines[1].startswith("timm.create_model('convit_tiny', ")
    text = model_file(trained, tmp_path / "c.pt")
    namespace: dict = {"__file__": str(tmp_path / "c.py")}
    exec(text, namespace)
    torch.save({"state_dict": model.state_dict()}, tmp_path / "c.pt")
    images: Tensor = torch.rand(2, 3, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(namespace["load"]()(images), trained.model(images), atol=1e-4, rtol=1e-4)
    encoder = load_mae(saved(tmp_path / "m.pth", create_model("mae_convit_ti", **sizes)))
    assert "qkv_bias=True" in export_timm(encoder, tmp_path / "m.safetensors", tmp_path / "m.json")[1]
