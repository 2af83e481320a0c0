"""CaiT beyond the recorded numbers: timm's model, stochastic depth, 16 bits, sizes, files, exports."""

import pytest
import timm
import torch

from mimir_fast.checkpoints.errors import CheckpointError
from mimir_fast.checkpoints.export import export_timm
from mimir_fast.checkpoints.robustbench import model_file
from mimir_fast.checkpoints.trained_models import load_classifier, load_mae
from mimir_fast.checkpoints.transfer import load_pretrained
from mimir_fast.models import create_classifier, create_model
from mimir_fast.models.families import recognise
from mimir_fast.models.families.cait.attention import TalkingHeads, TalkingHeadsBlock
from tests.support.golden import small_model

SIZES = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 3, "num_heads": 4, "init_values": 0.5}
DECODER = {"decoder_embed_dim": 16, "decoder_num_heads": 2}


def moved(model: torch.nn.Module, by: float = 0.3) -> torch.nn.Module:
    """The model with every trained parameter away from its start, where many are alike or zero."""
    torch.manual_seed(0)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += by * torch.randn_like(parameter)
    return model


def autoencoder(**options) -> torch.nn.Module:
    return moved(create_model("cait", **SIZES, **DECODER, norm_pix_loss=True, **options))


def saved(path, module, **args) -> str:
    torch.save({"model": module.state_dict(), "args": args}, path)
    return str(path)


def test_talking_heads_by_definition():
    """Head by head, also for queries that are the last tokens alone."""
    attention, x = moved(TalkingHeads(12, 3)).double(), torch.randn(2, 5, 12).double()
    q, k, v = attention.qkv(x).unflatten(2, (3, 3, 4)).unbind(2)
    for image in range(2):
        z = [q[image, :, a] @ k[image, :, a].T / 2 for a in range(3)]
        mixed = [
            sum(attention.proj_l.weight[a, b] * z[b] for b in range(3)) + attention.proj_l.bias[a] for a in range(3)
        ]
        w = [m.softmax(1) for m in mixed]
        for a in range(3):
            weights = sum(attention.proj_w.weight[a, b] * w[b] for b in range(3)) + attention.proj_w.bias[a]
            expected = weights @ v[image, :, a]
            torch.testing.assert_close(attention(x)[image, :, 4 * a : 4 * a + 4], expected)
            torch.testing.assert_close(attention(x, 3)[image, :, 4 * a : 4 * a + 4], expected[3:])


def test_heads_folded_into_one_attention_are_the_same():
    """Values and gradients, queries being the last tokens alone; the first mixing's bias has none either way."""
    attention, x = moved(TalkingHeads(12, 3)).double(), torch.randn(2, 5, 12, dtype=torch.float64, requires_grad=True)
    q, k, v = attention.qkv(x).unflatten(2, (3, -1)).unbind(2)
    found, expected = attention.folded(q[:, 2:], k, v), attention(x, 2)
    torch.testing.assert_close(found, expected)
    wanted, grad = [x, *(p for name, p in attention.named_parameters() if "proj." not in name)], torch.randn(2, 3, 12)
    for ours, theirs in zip(*(torch.autograd.grad(out, wanted, grad.double()) for out in (found, expected))):
        torch.testing.assert_close(ours, theirs)


def test_heads_are_folded_where_that_is_less(monkeypatch):
    """kernels="triton" stands for a GPU here; in fp32, in a wider model and in the reference nothing is folded."""
    monkeypatch.setattr(TalkingHeads, "folded", lambda self, q, k, v: q * 0)
    for width, dtype, kernels, folds in [
        (8, torch.bfloat16, "triton", True),
        (8, torch.float32, "triton", False),
        (12, torch.bfloat16, "triton", False),
        (8, torch.bfloat16, "reference", False),
    ]:
        attention = moved(TalkingHeads(width, 2, kernels)).to(dtype)
        assert (attention(torch.randn(1, 9, width, dtype=dtype)).count_nonzero() == 0) == folds


def test_the_order_of_kept_patches_does_not_matter():
    images, noise = torch.rand(2, 3, 16, 16).double(), torch.rand(2, 16)
    lowest = noise.sort(dim=1)[0]
    other = torch.where(noise < lowest[:, 4:5], lowest[:, 4:5] - noise, noise)
    model = autoencoder().double()
    first, second = (model(images, 0.75, noise=n) for n in (noise, other))
    torch.testing.assert_close(first[1], second[1])
    torch.testing.assert_close(first[3][:, 1:].flip(1), second[3][:, 1:])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_small_scale_survives_16_bits(dtype):
    """LayerScale begins at 1e-6: of a weight that is too little for fp16."""
    torch.manual_seed(0)
    block, x = TalkingHeadsBlock(32, 4, 2.0, 1e-6), torch.randn(2, 5, 32)
    torch.nn.init.normal_(block.mlp.fc2.weight)
    _, exact, _ = block(x)
    for linear in (m for m in block.modules() if isinstance(m, torch.nn.Linear)):
        linear.to(dtype)
    with torch.autocast("cpu", dtype):
        _, delta, _ = block(x)
    # In fp16 the result itself has steps of 6e-8, which are 2 % of it here.
    assert (delta.float() - exact).norm() < 0.03 * exact.norm()


@pytest.mark.parametrize(("ours", "theirs"), [("cait_xxs24", "cait_xxs24_224"), ("cait_xxs24_mh", "cait_xxs24_224")])
def test_logits_and_tokens_are_timms(ours, theirs):
    model = moved(create_classifier(ours, img_size=32, patch_size=8, num_classes=5), 0.05).eval()
    options = {"img_size": 32, "patch_size": 8, "num_classes": 5, "num_heads": model.blocks[0].attn.num_heads}
    timms = timm.create_model(theirs, **options).eval()
    timms.load_state_dict(model.state_dict(), strict=True)
    images = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(model(images), timms(images), atol=1e-4, rtol=1e-4)
        found, expected = model.forward_features(images), timms.forward_features(images)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_stochastic_depth_by_the_formula(checkpointing):
    """The same rate in every block of the trunk, none in the class token's layers."""
    rate, images, noise = 0.4, torch.rand(6, 3, 16, 16), torch.rand(3, 2, 6)
    options = {"drop_path": rate, "num_classes": 5, "activation_checkpointing": checkpointing}
    model = moved(create_classifier("cait", **SIZES, **options))
    x = model.patch_embed(model.patchify(images)) + model.pos_embed
    for i, block in enumerate(model.blocks):
        attention, mlp = (((draw >= rate) / (1 - rate))[:, None, None] for draw in noise[i])
        x = x + attention * block.gamma_1 * block.attn.proj(block.attn(block.norm1(x)))
        hidden = torch.nn.functional.gelu(block.mlp.fc1(block.norm2(x)))
        x = x + mlp * block.gamma_2 * block.mlp.fc2(hidden)
    cls_token = model.cls_token.expand(6, -1, -1)
    for block in model.blocks_token_only:
        cls_token = block(cls_token, x)
    expected, found = model.head(model.norm(cls_token)[:, 0]), model(images, noise)
    torch.testing.assert_close(found, expected)
    assert not torch.allclose(found, model(images))
    parameters = list(model.parameters())
    for ours, theirs in zip(*(torch.autograd.grad(out.square().sum(), parameters) for out in (found, expected))):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("ratio", [0.3, 0.5, 0.9])
def test_any_ratio_and_any_grid(ratio):
    model = create_model("cait", **{**SIZES, "img_size": 20}, **DECODER)
    loss, pred, mask, latent = model(torch.rand(2, 3, 20, 20), ratio)
    kept = int(25 * (1 - ratio))
    assert (pred.shape, latent.shape) == ((2, 25, 48), (2, 1 + kept, 24))
    assert mask.sum(1).tolist() == [25 - kept] * 2
    assert loss.isfinite()


def test_wrong_sizes_name_the_argument():
    for match, call in {
        "compat: expected None or 'original', got 'old'": lambda: autoencoder(compat="old"),
        "depth: expected 1 or more, got 0": lambda: create_model("cait", **SIZES | {"depth": 0}),
        "depth_token_only: expected 1 or more, got 0": lambda: create_model("cait", **SIZES, depth_token_only=0),
        "decoder_depth: expected 1 or more, got 0": lambda: autoencoder(decoder_depth=0),
        "num_heads: 5 does not divide the width 24": lambda: create_model("cait", **SIZES | {"num_heads": 5}),
        "patch_size": lambda: create_model("cait", **SIZES | {"patch_size": 3}),
        "images": lambda: create_classifier("cait", **SIZES)(torch.rand(2, 3, 8, 8)),
    }.items():
        with pytest.raises(ValueError, match=match):
            call()


@pytest.mark.slow
def test_compiles_without_a_graph_break():
    model, images, noise = autoencoder(), torch.rand(2, 3, 16, 16), torch.rand(2, 16)
    trained = [p for p in model.parameters() if p.requires_grad]
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    losses = compiled(images, noise=noise)[0], model(images, noise=noise)[0]
    assert losses[0].item() == pytest.approx(losses[1].item(), rel=1e-6)
    for ours, theirs in zip(*(torch.autograd.grad(loss, trained) for loss in losses)):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


def test_files_are_recognised_and_start_classifiers(tmp_path):
    """A CaiT's tensors include all that a ViT is known by."""
    sizes = {"img_size": 16, "patch_size": 4}
    model, said = create_model("mae_cait_xxs24_dec128d2b", **sizes), []
    assert recognise(model.state_dict()).name == "cait"
    assert recognise(small_model().state_dict()).name == "vit"
    trained = load_mae(saved(tmp_path / "m.pth", model, compat="original"))
    assert (trained.args["model"], trained.args["input_size"], trained.model.compat) == (
        "mae_cait_xxs24",
        16,
        "original",
    )
    classifier = create_classifier("cait_xxs24", img_size=24, patch_size=4)
    load_pretrained(classifier, model.state_dict(), "x.pth", said.append, 0.02)
    assert said[0] == "finetune: x.pth: 474 of 476 tensors loaded"
    assert said[-1] == "  positional table resized from 4 x 4 to 6 x 6 patches"
    with pytest.raises(CheckpointError, match=r"holds cait_xxs24 \(width 192, 4 heads, depth 24 \+ 2, MLP width 768\)"):
        load_pretrained(create_classifier("cait_xxs24_mh", **sizes), model.state_dict(), "x.pth", print, 0.02)
    with pytest.raises(CheckpointError, match=r"finetune: x\.pth is no whole CaiT encoder"):
        load_pretrained(classifier, small_model().state_dict(), "x.pth", print, 0.02)


@pytest.mark.parametrize("name", ["cait_xxs24", "cait_xxs24_12layer"])
def test_exports(tmp_path, name):
    """What is written was loaded by timm, and gave the same outputs."""
    sizes = {"img_size": 16, "patch_size": 4}
    model = moved(create_classifier(name, num_classes=5, **sizes), 0.05)
    trained = load_classifier(saved(tmp_path / "c.pth", model))
    lines = export_timm(trained, tmp_path / "c.safetensors", tmp_path / "c.json")
    assert lines[1].startswith("timm.create_model('cait_xxs24_224', ")
    namespace: dict = {"__file__": str(tmp_path / "c.py")}
    exec(model_file(trained, tmp_path / "c.pt"), namespace)
    torch.save({"state_dict": model.state_dict()}, tmp_path / "c.pt")
    images = torch.rand(2, 3, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(namespace["load"]()(images), trained.model(images), atol=1e-4, rtol=1e-4)
